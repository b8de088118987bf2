"""Eviction and merging, against the same thing written token by token in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_eviction import NOTED_BYTES
from polydelta.kernels.kv_merging import SIMILARITY, MergingTokens
from polydelta.kernels.kv_rotation import rotated
from polydelta.kernels.kv_selection import FULL, H2O, Selection, SnapKV
from polydelta.kernels.ops import SequenceSlice

Trial = Callable[..., Any]
Near = Callable[[Tensor, Tensor, torch.dtype], None]


@dataclass
class Token:
    """Of one kv head."""

    position: int
    # [head_dim] float64, as they are stored
    key: Tensor
    value: Tensor
    received: float = 0.0


class Expected:
    """The definition: what a sequence has, and what its queries get."""

    def __init__(self, trial: Any, number: int, selection: SnapKV | H2O, prompt: int) -> None:
        self.trial, self.number, self.selection, self.prompt = trial, number, selection, prompt
        kind = trial.kind
        self.group = kind.shape.num_heads // kind.shape.num_kv_heads
        self.heads: list[list[Token]] = [[] for _ in range(kind.shape.num_kv_heads)]

    def coded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the format makes of a token of one head."""
        both = (each.to(self.trial.kind.dtype).view(1, 1, 1, -1) for each in (key, value))
        keys, values = self.trial.kind.format.decode(self.trial.kind.format.encode(*both))
        return keys[0, 0, 0].double(), values[0, 0, 0].double()

    def step(self, position: int) -> Tensor:
        """What the query gets, `[heads, head_dim]`, and then what follows."""
        keys, values = self.trial.keys[self.number], self.trial.values[self.number]
        out = []
        for head, tokens in enumerate(self.heads):
            tokens.append(
                Token(position, *self.coded(keys[position, head], values[position, head]))
            )
            for query in self.trial.queries[self.number][position].double().split(self.group)[head]:
                scores = [float(query @ each.key) / math.sqrt(len(query)) for each in tokens]
                shares = torch.tensor(scores, dtype=torch.float64).softmax(0)
                out.append(
                    sum(share * each.value for share, each in zip(shares, tokens, strict=True))
                )
                if self.votes(position):
                    for share, each in zip(shares.tolist(), tokens, strict=True):
                        each.received += share
            if position == self.prompt - 1 and self.selection.kept(self.prompt) < self.prompt:
                self.heads[head] = self.leave(tokens, self.of_prompt(tokens))
            elif position >= self.prompt and isinstance(self.selection, H2O):
                newest = [each.position > position - self.recent for each in tokens]
                least = min(
                    each.received for each, new in zip(tokens, newest, strict=True) if not new
                )
                self.heads[head] = self.leave(tokens, [each.received != least for each in tokens])
        return torch.stack(out)

    @property
    def recent(self) -> int:
        assert isinstance(self.selection, H2O)
        return max(1, int(self.selection.recent * self.prompt))

    def votes(self, position: int) -> bool:
        return isinstance(self.selection, H2O) or self.prompt - 32 <= position < self.prompt

    def of_prompt(self, tokens: list[Token]) -> list[bool]:
        """Which stay of a prompt."""
        votes = [each.received for each in tokens]
        newest = 32
        if isinstance(self.selection, H2O):
            newest = self.recent
        votes = votes[: self.prompt - newest]
        if isinstance(self.selection, SnapKV):
            around = [0.0, 0.0, *votes, 0.0, 0.0]
            votes = [sum(around[place : place + 5]) / 5 for place in range(len(votes))]
        order = sorted(range(len(votes)), key=lambda place: (-votes[place], place))
        chosen = order[: self.selection.kept(self.prompt) - newest]
        return [place in chosen or place >= len(votes) for place in range(self.prompt)]

    def leave(self, tokens: list[Token], stays: Sequence[bool]) -> list[Token]:
        """What becomes of those that stay."""
        kept = [each for each, stay in zip(tokens, stays, strict=True) if stay]
        groups: list[list[Token]] = [[each] for each in kept]
        for token in (each for each, stay in zip(tokens, stays, strict=True) if not stay):
            likeness = [float(cosine(token.key, each.key)) for each in kept]
            if max(likeness) > SIMILARITY:
                groups[likeness.index(max(likeness))].append(token)
        merged = []
        for group in groups:
            weight = sum(each.received for each in group)
            if len(group) == 1 or weight == group[0].received:
                merged.append(group[0])
                continue
            key = sum(each.received * each.key for each in group) / weight
            value = sum(each.received * each.value for each in group) / weight
            merged.append(Token(group[0].position, *self.coded(key, value), weight))
        return merged


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return one @ other / (one.norm() * other.norm())


def alike(trial: Any, spread: float = 0.5) -> Any:
    """Tokens whose keys are near a few directions, so that many are merged."""
    for keys in trial.keys:
        directions = torch.randn(7, *keys.shape[1:], generator=trial.generator)
        which = torch.randint(7, (len(keys),), generator=trial.generator)
        keys.mul_(spread).add_(directions[which].to(keys.dtype))
    return trial


def slices_of(
    trial: Any, number: int, selection: Selection, prompt: int, ends: Sequence[int]
) -> list[tuple[int, SequenceSlice]]:
    """A sequence in steps that end at these positions: the first one of each, and its slice, as the
    engine makes it."""
    parts, first = [], 0
    for last in ends:
        evicted = 0
        if first >= prompt and selection != FULL:
            evicted = prompt - selection.kept(prompt)
            if isinstance(selection, H2O):
                evicted += first - prompt
        slot, pages = number, trial.pages[number]
        part = SequenceSlice(0, last - first, last - evicted, pages, selection, slot, prompt)
        parts.append((first, part))
        first = last
    return parts


def run(
    trial: Any, number: int, selection: Selection, prompt: int, ends: Sequence[int]
) -> list[Tensor]:
    """What each of the queries gets."""
    out: list[Tensor] = []
    for first, part in slices_of(trial, number, selection, prompt, ends):
        rows = slice(first, first + part.length)
        sides = (each[number][rows] for each in (trial.queries, trial.keys, trial.values))
        plan = trial.attention.plan([part])
        out += trial.attention.attend(plan, trial.layer, trial.memory, *sides)
    return out


def in_steps(prompt: int, total: int, chunk: int = 1000) -> list[int]:
    """Where steps end: a prompt in chunks, the last one of at least 32 tokens, then one by one."""
    ends = [end for end in range(chunk, prompt, chunk) if end <= prompt - 32]
    return [*ends, prompt, *range(prompt + 1, total + 1)]


SHAPES = [(3, 3, 16), (4, 2, 8), (5, 1, 24)]


@pytest.mark.parametrize("format", ["native", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("selection", [SnapKV(40), H2O(0.2, 0.15)], ids=str)
def test_answers_read_what_stays_of_a_prompt(
    kv_trial: Trial, near: Near, format: str, shape: tuple[int, int, int], selection: SnapKV | H2O
) -> None:
    heads, kv_heads, head_dim = shape
    prompt, total = 71, 83
    trial = alike(
        kv_trial(format, [total], heads=heads, kv_heads=kv_heads, head_dim=head_dim, seed=heads)
    )
    expected = Expected(trial, 0, selection, prompt)
    got = run(trial, 0, selection, prompt, in_steps(prompt, total, 19))
    for position, out in enumerate(got):
        if format == "native":
            near(out, expected.step(position), torch.float32)
        else:
            # A merged token's scale may be rounded to the other side.
            torch.testing.assert_close(out, expected.step(position), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "selection", [SnapKV(33), SnapKV(36), H2O(0.3, 0.01), H2O(0.01, 0.5)], ids=str
)
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_kept_tokens_are_in_order_and_have_taken_in_what_is_like_them(
    kv_trial: Trial, near: Near, selection: SnapKV | H2O, spread: float
) -> None:
    prompt = 60
    trial = alike(kv_trial("native", [prompt], seed=3), spread)
    expected = Expected(trial, 0, selection, prompt)
    run(trial, 0, selection, prompt, [prompt])
    for position in range(prompt):
        expected.step(position)
    kept = torch.arange(selection.kept(prompt)).expand(trial.kind.shape.num_kv_heads, -1)
    part = SequenceSlice(0, 1, kept.shape[1], trial.pages[0])
    keys, values = trial.attention.load(trial.memory, part, kept)
    near(keys, stacked(expected, "key"), torch.float32)
    near(values, stacked(expected, "value"), torch.float32)
    stayed = trial.keys[0][[each.position for each in expected.heads[0]], 0]
    merged = (stayed != keys[0]).any(1).float().mean()
    assert (merged > 0.2) == (spread < 1)


def stacked(expected: Expected, what: str) -> Tensor:
    """`[kv_heads, kept, head_dim]`"""
    return torch.stack(
        [torch.stack([getattr(each, what) for each in head]) for head in expected.heads]
    )


@pytest.mark.parametrize("selection", [SnapKV(40), H2O(0.2, 0.15)], ids=str)
@pytest.mark.parametrize("format", ["native", "int8"])
def test_how_a_prompt_is_cut_does_not_matter(
    kv_trial: Trial, near: Near, selection: Selection, format: str
) -> None:
    prompt, total = 97, 104
    whole, *cut = (
        torch.stack(run(alike(kv_trial(format, [total])), 0, selection, prompt, ends))
        for ends in (
            in_steps(prompt, total),
            in_steps(prompt, total, 13),
            in_steps(prompt, total, 1),
        )
    )
    for each in cut:
        near(each, whole, torch.float32)


@pytest.mark.parametrize(
    ("format", "selection", "prompt"),
    [
        *((format, SnapKV(40), prompt) for format in ("native", "kivi-4") for prompt in (40, 3, 1)),
        *((format, H2O(0.5, 0.5), 12) for format in ("native", "int8")),
        ("native", H2O(0.1, 0.1), 2),
    ],
    ids=str,
)
def test_a_prompt_of_which_all_stays_is_read_as_it_is(
    kv_trial: Trial, near: Near, format: str, selection: Selection, prompt: int
) -> None:
    total = prompt + (1 if isinstance(selection, H2O) else 9)
    plain, evicting = (
        torch.stack(run(kv_trial(format, [total]), 0, each, prompt, in_steps(prompt, total, 5)))
        for each in (FULL, selection)
    )
    assert torch.equal(plain, evicting)


@pytest.mark.parametrize("format", ["int4", "fp8", "mustafar-50", "kivi-4", "kivi-2", "gear"])
@pytest.mark.parametrize("capacity", [33, 48])
def test_pages_of_what_stays_are_encoded_anew_and_the_last_is_open(
    kv_trial: Trial, near: Near, format: str, capacity: int
) -> None:
    selection, prompt, total = SnapKV(capacity), 70, 85
    trial = alike(kv_trial(format, [total], page_tokens=4))
    run(trial, 0, FULL, prompt, [prompt])
    # What it has before anything is evicted, in full precision elsewhere.
    part = SequenceSlice(0, 1, prompt, trial.pages[0], FULL, 0)
    positions = torch.arange(prompt).expand(trial.kind.shape.num_kv_heads, -1)
    before = trial.attention.load(trial.memory, part, positions)
    same = kv_trial("native", [total])
    same.queries = trial.queries
    turn = rotated if trial.kind.format.rotates_keys else torch.clone
    # Twice is not at all.
    keys, values = (each.transpose(0, 1) for each in before)
    same.keys, same.values = [turn(keys)], [values.clone()]
    run(same, 0, selection, prompt, [prompt])
    run(trial, 0, selection, prompt, [prompt])
    places = positions[:, :capacity]
    part = SequenceSlice(0, 1, capacity, same.pages[0])
    stayed = [each.transpose(0, 1) for each in same.attention.load(same.memory, part, places)]
    trial.keys[0] = torch.cat((stayed[0], trial.keys[0][prompt:]))
    trial.values[0] = torch.cat((stayed[1], trial.values[0][prompt:]))
    trial.queries[0] = torch.cat((trial.queries[0][:capacity], trial.queries[0][prompt:]))
    for number in range(total - prompt):
        position = capacity + number
        rows = slice(position, position + 1)
        slice_ = SequenceSlice(0, 1, position + 1, trial.pages[0], selection, 0, prompt)
        sides = (each[0][rows] for each in (trial.queries, trial.keys, trial.values))
        plan = trial.attention.plan([slice_])
        out = trial.attention.attend(plan, trial.layer, trial.memory, *sides)
        reads = torch.ones(trial.kind.shape.num_kv_heads, position + 1, dtype=torch.bool)
        near(out[0], trial.attended(0, position, reads), torch.float32)


def test_a_token_that_is_only_moved_stays_as_it_was_stored(kv_trial: Trial) -> None:
    selection, prompt = SnapKV(35), 64
    trial = kv_trial("int8", [prompt], dtype=torch.bfloat16)
    run(trial, 0, FULL, prompt, [prompt])
    before = {name: tokens_of(trial, name).clone() for name in trial.kind.stored}
    run(trial, 0, selection, prompt, [prompt])
    expected = Expected(trial, 0, selection, prompt)
    for position in range(prompt):
        expected.step(position)
    for head, tokens in enumerate(expected.heads):
        came_from = [each.position for each in tokens]
        for name, stored in before.items():
            assert torch.equal(tokens_of(trial, name)[:35, head], stored[came_from, head])


def tokens_of(trial: Any, name: str) -> Tensor:
    """A section by place of the first sequence, `[places, kv_heads, ...]`."""
    pages = trial.kind.layout.view(trial.memory.pages, name)[trial.pages[0]]
    flat: Tensor = pages.flatten(0, 1)
    return flat


@pytest.mark.parametrize("selection", [SnapKV(36), H2O(0.3, 0.2)], ids=str)
def test_sequences_beside_each_other_do_not_disturb_each_other(
    kv_trial: Trial, near: Near, selection: SnapKV | H2O
) -> None:
    prompts, total = [50, 41], 55
    trial = alike(kv_trial("native", [total, total]))
    alone = [Expected(trial, number, selection, prompts[number]) for number in range(2)]
    steps = [
        slices_of(trial, number, selection, prompts[number], in_steps(prompts[number], total))
        for number in range(2)
    ]
    # The second one begins later, and an answer of full attention comes between.
    steps[1] = [*steps[1]]
    for time in range(len(steps[1]) + 2):
        now = [
            (number, *steps[number][time - 2 * number])
            for number in range(2)
            if 0 <= time - 2 * number < len(steps[number])
        ]
        slices, sides, start = [], ([], [], []), 0
        for number, first, part in now:
            slices.append(SequenceSlice(start, *list(vars(part).values())[1:]))
            start += part.length
            for side, each in zip(sides, (trial.queries, trial.keys, trial.values), strict=True):
                side.append(each[number][first : first + part.length])
        plan = trial.attention.plan(slices)
        out = trial.attention.attend(
            plan, trial.layer, trial.memory, *(torch.cat(side) for side in sides)
        )
        for (number, first, part), part_now in zip(now, slices, strict=True):
            for row in range(part.length):
                near(out[part_now.start + row], alone[number].step(first + row), torch.float32)


def test_a_slot_is_taken_over_by_another_sequence(kv_trial: Trial) -> None:
    for selection in (SnapKV(36), H2O(0.3, 0.2)):
        first, again = (
            torch.stack(run(trial, 0, selection, 50, in_steps(50, 60)))
            for trial in [kv_trial("native", [60])] * 2
        )
        assert torch.equal(first, again)


@pytest.mark.parametrize("selection", [SnapKV(36), H2O(0.3, 0.2)], ids=str)
def test_what_is_noted_of_a_sequence_is_small_and_goes_with_it(
    kv_trial: Trial, selection: SnapKV | H2O
) -> None:
    prompt = 50
    trial = kv_trial("native", [60, 60])
    for number in (0, 1):
        run(trial, number, selection, prompt, in_steps(prompt, 60))
    states = trial.attention._eviction._sequences
    slots = set(states)
    assert len(slots) == 2
    each = [state for layers in states.values() for state in layers.values()]
    noted = sum(state.received.nbytes + state.positions.nbytes for state in each)
    tokens = len(slots) * trial.kind.shape.num_kv_heads * selection.kept(prompt)
    assert noted == (tokens * NOTED_BYTES if isinstance(selection, H2O) else 0)
    trial.attention.forget(slots.pop())
    assert set(states) == slots


def test_recomputed_answers_evict_nothing_again(kv_trial: Trial, near: Near) -> None:
    """Even where they come together, and end at as many tokens as the prompt had."""
    selection, prompt, total = SnapKV(40), 45, 53
    one_by_one, together = (
        torch.stack(run(alike(kv_trial("native", [total])), 0, selection, prompt, ends))
        for ends in (in_steps(prompt, total), [prompt, prompt + 5, total])
    )
    near(together, one_by_one, torch.float32)


def test_what_cannot_be_evicted_from_is_refused(kv_trial: Trial) -> None:
    with pytest.raises(ValueError, match="h2o cannot evict from pages of kivi-4"):
        run(kv_trial("kivi-4", [9]), 0, H2O(), 9, [9])
    with pytest.raises(ValueError, match="snapkv cannot evict from layers with a window"):
        run(kv_trial("native", [50], window=4), 0, SnapKV(33), 50, [50])


def test_tokens_merge_into_the_most_similar_by_the_attention_that_they_received() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    values = torch.tensor([[[1.0, 1.0], [5.0, 0.0]]])
    merging = MergingTokens(keys, values, torch.tensor([[3.0, 2.0]]))
    gone = torch.tensor([[[4.0, 0.4], [-1.0, -1.0], [0.5, 0.0], [0.0, 9.0]]])
    merging.merge(gone, gone * 10, torch.tensor([[1.0, 7.0, 2.0, 0.0]]))
    got_keys, got_values, weights, changed = merging.result()
    # The second is like none and the fourth has no weight.
    assert torch.allclose(got_keys, torch.tensor([[[8.0 / 6, 0.4 / 6], [0.0, 2.0]]]))
    assert torch.allclose(got_values, torch.tensor([[[53.0 / 6, 7.0 / 6], [5.0, 0.0]]]))
    assert weights.tolist() == [[6.0, 2.0]]
    assert changed.tolist() == [[True, False]]
