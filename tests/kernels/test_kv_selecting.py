"""What queries choose to read, against a search through all that they could, one token and one head
after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import starmap
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_notes import representatives
from polydelta.kernels.kv_selecting import select
from polydelta.kernels.kv_selection import FULL, DoubleSparsity, InfLLM, Quest, Selection
from polydelta.kernels.ops import SequenceSlice

Near = Callable[[Tensor, Tensor, torch.dtype], None]
Trial = Callable[..., Any]
CHOICES: list[Selection] = [Quest(16), DoubleSparsity(7), InfLLM(5, 9, 12)]
PLAIN, SEVERAL = "native", ["native", "int8", "int4", "fp8", "mustafar-50", "kivi-2", "gear"]


def dots(query: Tensor, keys: Iterable[Tensor]) -> list[float]:
    return [math.fsum((query * key).tolist()) for key in keys]


def highest(scores: dict[int, float], count: int) -> set[int]:
    """Rounded, so that what is equal but for the order of a sum stays equal."""
    return set(sorted(scores, key=lambda place: (-round(scores[place], 9), place))[:count])


def largest_shares(trial: Any, scores: dict[int, list[float]]) -> dict[int, float]:
    """Of each candidate, whose scores are those of the query heads: the largest share that one of
    them would give of its attention, in logarithms."""
    shares = dict.fromkeys(scores, -math.inf)
    for each in zip(*scores.values(), strict=True):
        scaled = [score / math.sqrt(trial.kind.shape.head_dim) for score in each]
        top = max(scaled)
        total = top + math.log(math.fsum(math.exp(score - top) for score in scaled))
        for place, score in zip(scores, scaled, strict=True):
            shares[place] = max(shares[place], score - total)
    return shares


def chosen(trial: Any, number: int, position: int, head: int, selection: Selection) -> set[int]:
    """The definition: the positions that a kv head reads."""
    size, own = trial.size, position // trial.size
    group = trial.kind.shape.num_heads // trial.kind.shape.num_kv_heads
    queries = trial.turned(trial.queries[number])[
        position, head * group : (head + 1) * group
    ].double()
    keys = trial.stored(number, position)[0][:, head]
    pages = [range(first, first + size) for first in range(0, own * size, size)]
    match selection:
        case Quest(budget):
            wanted = max(3, math.ceil(budget / size))
            if own + 1 <= wanted:
                return set(range(position + 1))
            scores: dict[int, list[float]] = {}
            for page in range(1, own):
                least, most = keys[pages[page]].amin(0), keys[pages[page]].amax(0)
                middle, half = (least + most) / 2, (most - least) / 2
                scores[page] = [
                    math.fsum((query * middle + query.abs() * half / 2).tolist())
                    for query in queries
                ]
            best = highest(largest_shares(trial, scores), wanted - 2)
            reads = set().union(*(pages[page] for page in best), pages[0])
            return reads | set(range(own * size, position + 1))
        case DoubleSparsity(budget):
            labels = trial.kind.labels[trial.layer, head]
            all_scores = [dots(query[labels], keys[:position, labels]) for query in queries]
            scores = dict(enumerate(map(list, zip(*all_scores, strict=True))))
            return highest(largest_shares(trial, scores), budget - 1) | {position}
        case InfLLM(sinks, recent, budget):
            between, scores = range(sinks, position + 1 - recent), {}
            for number, page in enumerate(pages):
                if page[0] in between and page[-1] in between:
                    means = dict(enumerate(dots(keys[page].mean(0), keys[page])))
                    tokens = keys[[page[place] for place in highest(means, 4)]]
                    scores[number] = [max(dots(query, tokens)) for query in queries]
            best = highest(largest_shares(trial, scores), math.ceil(budget / size))
            left = scores.keys() - best
            return set(range(position + 1)) - set().union(*(pages[number] for number in left))
    raise AssertionError(selection)


def expected(trial: Any, number: int, position: int, selection: Selection) -> Tensor:
    """What a query gets, `[heads, head_dim]`."""
    reads = torch.zeros(trial.kind.shape.num_kv_heads, position + 1, dtype=torch.bool)
    for head, row in enumerate(reads):
        row[list(chosen(trial, number, position, head, selection))] = True
    return trial.attended(number, position, reads)  # type: ignore[no-any-return]


def answers(trial: Any, number: int, first: int, selection: Selection) -> list[Tensor]:
    """Token by token from a position to the end."""
    stop = len(trial.queries[number])
    return [trial.step([(number, at, at + 1, selection)])[0][0] for at in range(first, stop)]


@pytest.mark.parametrize("selection", CHOICES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("format", SEVERAL)
def test_a_query_reads_what_scores_highest(
    kv_trial: Trial, near: Near, format: str, heads: int, kv_heads: int, selection: Selection
) -> None:
    trial = kv_trial(format, [70], selection, heads=heads, kv_heads=kv_heads, head_dim=32)
    assert trial.size < 9, "There is something to choose."
    trial.step([(0, 0, 41, FULL)])
    for position, out in enumerate(answers(trial, 0, 41, selection), start=41):
        near(out, expected(trial, 0, position, selection), torch.float64)


@pytest.mark.parametrize(
    "selection",
    [
        *map(Quest, (1, 8, 25, 999)),
        *map(DoubleSparsity, (1, 2, 30, 999)),
        *starmap(InfLLM, [(0, 1, 0), (3, 7, 4), (4, 8, 9), (1, 50, 3), (60, 1, 1)]),
    ],
    ids=str,
)
def test_every_length_from_the_first_token_on(
    kv_trial: Trial, near: Near, selection: Selection
) -> None:
    trial = kv_trial(PLAIN, [61], selection)
    for position, out in enumerate(answers(trial, 0, 0, selection)):
        near(out, expected(trial, 0, position, selection), torch.float64)


def test_more_blocks_than_are_looked_at_together(
    kv_trial: Trial, near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polydelta.kernels.kv_selecting._AT_ONCE", 11)
    trial = kv_trial("int8", [70], InfLLM(1, 1, 20))
    trial.step([(0, 0, 60, FULL)])
    for position, out in enumerate(answers(trial, 0, 60, InfLLM(1, 1, 20)), start=60):
        near(out, expected(trial, 0, position, InfLLM(1, 1, 20)), torch.float64)


@pytest.mark.parametrize("selection", CHOICES, ids=str)
@pytest.mark.parametrize("format", [PLAIN, "kivi-4"])
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float64], ids=str)
def test_of_equal_scores_the_lower_position_is_read(
    kv_trial: Trial, near: Near, format: str, query_dtype: torch.dtype, selection: Selection
) -> None:
    trial = kv_trial(
        format, [90], selection, head_dim=8, whole_numbers=True, query_dtype=query_dtype
    )
    if trial.kind.format.by_page:
        # Codes of 4 bits have these exactly: a page with the least and the most of all channels.
        trial.keys[0][:: trial.size] = 0
        trial.keys[0][1 :: trial.size] = 15
    trial.step([(0, 0, 50, FULL)])
    for position, out in enumerate(answers(trial, 0, 50, selection), start=50):
        near(out, expected(trial, 0, position, selection), query_dtype)


def test_many_equal_scores_leave_the_first_ones(kv_trial: Trial) -> None:
    trial = kv_trial(PLAIN, [300], DoubleSparsity(9))
    trial.keys[0][:] = 1
    trial.step([(0, 0, 300, FULL)])
    part = SequenceSlice(0, 1, 300, trial.pages[0], DoubleSparsity(9), 0)
    reads = select(trial.kind, 2, trial.memory, part, trial.turned(trial.queries[0][-1:]))
    assert reads is not None
    assert reads.tolist() == [[*range(8), 299]] * 2


@pytest.mark.parametrize("selection", CHOICES, ids=str)
@pytest.mark.parametrize("format", [PLAIN, "mustafar-70", "kivi-2"])
def test_a_budget_for_all_is_full_attention_to_the_bit(
    kv_trial: Trial, format: str, selection: Selection
) -> None:
    roomy = replace(selection, budget=67)
    trial = kv_trial(format, [67], roomy, query_dtype=torch.float32)
    trial.step([(0, 0, 40, FULL)])
    for position in range(40, 67):
        (full,) = trial.step([(0, position, position + 1, FULL)])
        (some,) = trial.step([(0, position, position + 1, roomy)])
        assert torch.equal(full, some)


@pytest.mark.parametrize(("layer", "reads_all"), [(0, True), (1, True), (2, False), (7, False)])
def test_quest_reads_everything_in_the_first_two_layers(
    kv_trial: Trial, near: Near, layer: int, reads_all: bool
) -> None:
    trial = kv_trial(PLAIN, [64], Quest(8), layer=layer)
    trial.step([(0, 0, 63, FULL)])
    (out,) = trial.step([(0, 63, 64, Quest(8))])
    all_of_them = trial.attended(0, 63, torch.ones(2, 64, dtype=torch.bool))
    near(out[0], all_of_them if reads_all else expected(trial, 0, 63, Quest(8)), torch.float64)


@pytest.mark.parametrize("selection", CHOICES, ids=str)
def test_a_layer_with_a_window_reads_that(
    kv_trial: Trial, near: Near, selection: Selection
) -> None:
    trial = kv_trial(PLAIN, [64], selection, window=40)
    trial.step([(0, 0, 63, FULL)])
    (out,) = trial.step([(0, 63, 64, selection)])
    near(out[0], trial.attended(0, 63, (torch.arange(64) > 23).expand(2, -1)), torch.float64)


@pytest.mark.parametrize("selection", CHOICES, ids=str)
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_neither_cuts_nor_company_change_a_choice(
    kv_trial: Trial, near: Near, format: str, selection: Selection
) -> None:
    alone = kv_trial(format, [80], selection)
    alone.step([(0, 0, 60, FULL)])
    wanted = torch.stack(answers(alone, 0, 60, selection))
    beside = kv_trial(format, [80, 60, 72], selection, seed=1)
    for side in ("queries", "keys", "values"):
        getattr(beside, side)[0] = getattr(alone, side)[0]
    for first in range(0, 60, 12):
        beside.step([(number, first, first + 12, FULL) for number in (1, 0)])
    beside.step([(2, 0, 55, FULL)])
    got = []
    for at in range(60, 80):
        parts = [(2, at - 5, at - 4, selection), (0, at, at + 1, selection)]
        got.append(beside.step(parts if at < 77 else parts[1:])[-1][0])
    near(torch.stack(got), wanted, torch.float64)


@pytest.mark.parametrize("selection", CHOICES, ids=str)
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_answers_computed_again_in_one_step_read_what_they_read_before(
    kv_trial: Trial, format: str, selection: Selection
) -> None:
    trial = kv_trial(format, [80], selection)
    trial.step([(0, 0, 33, FULL)])
    before = answers(trial, 0, 33, selection)
    trial.memory.pages.fill_(255)
    parts = [(0, 0, 33, FULL), *((0, at, at + 1, selection) for at in range(33, 80))]
    for again, out in zip(trial.step(parts)[1:], before, strict=True):
        assert torch.equal(again[0], out)


@pytest.mark.parametrize("selection", CHOICES, ids=str)
@pytest.mark.parametrize("format", [PLAIN, "int4", "kivi-2"])
def test_pages_in_host_memory_are_read_like_those_in_the_pool(
    kv_trial: Trial, format: str, selection: Selection
) -> None:
    trials = [kv_trial(format, [80, 40], selection, host_pages=30) for _ in range(2)]
    for trial in trials:
        trial.step([(0, 0, 60, FULL), (1, 0, 40, FULL)])
    _, moved = trials
    moved.to_host(0, range(1, 40 // moved.size))
    moved.to_host(1, [0])
    assert sum(page >= len(moved.memory.pages) for page in moved.pages[0]) >= 2
    for here, there in zip(*(answers(trial, 0, 60, selection) for trial in trials), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("selection", CHOICES, ids=str)
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_choice_is_ascending_and_has_the_querys_own_token(
    kv_trial: Trial, format: str, selection: Selection
) -> None:
    trial = kv_trial(format, [77], selection, page_tokens=3)
    trial.step([(0, 0, 77, FULL)])
    part = SequenceSlice(0, 1, 77, trial.pages[0], selection, 0)
    reads = select(trial.kind, trial.layer, trial.memory, part, trial.turned(trial.queries[0][-1:]))
    assert reads is not None
    assert reads.dtype == torch.int64
    assert (reads.diff(dim=1) > 0).all()
    assert (reads[:, 0] >= 0).all()
    assert (reads[:, -1] == 76).all()


@pytest.mark.parametrize(("tokens", "head_dim"), [(16, 64), (31, 40), (7, 128), (56, 16)])
def test_representatives_are_the_same_whatever_pages_close_beside(
    tokens: int, head_dim: int
) -> None:
    """Of keys that are near to one another."""
    chance = torch.Generator().manual_seed(tokens)
    own = torch.randn(40, tokens, 3, head_dim, generator=chance)
    keys = (1 + own * 1e-4).float()
    together = representatives(keys, 4)
    alone = torch.cat([representatives(page[None], 4) for page in keys])
    assert torch.equal(together, alone)


def test_a_page_of_few_tokens_repeats_its_representatives(kv_trial: Trial) -> None:
    trial = kv_trial(PLAIN, [9], InfLLM(), kv_heads=4, head_dim=32, page_tokens=3)
    assert trial.size == 3
    trial.step([(0, 0, 9, FULL)])
    places = trial.kind.layout.view(trial.memory.pages, "representatives")[trial.pages[0]]
    assert torch.equal(places[..., 3], places[..., 0])
    assert places[..., :3].sort(-1).values.tolist() == [[[0, 1, 2]] * 4] * 3


@pytest.mark.parametrize("format", [PLAIN, "int8", "kivi-2"])
def test_bounds_of_a_page_hold_its_keys_as_they_are_stored(kv_trial: Trial, format: str) -> None:
    trial = kv_trial(format, [60], Quest())
    trial.run()
    closed = 60 // trial.size
    stored = trial.stored(0, closed * trial.size - 1)[0].clone()
    if trial.kind.format.by_page:
        stored = trial.stored(0, closed * trial.size)[0][: closed * trial.size]
    keys = stored.unflatten(0, (closed, trial.size))
    view = trial.kind.layout.view
    for name, bound in (("key_least", keys.amin(1)), ("key_most", keys.amax(1))):
        noted = view(trial.memory.pages, name)[trial.pages[0][:closed]]
        assert torch.equal(noted.double(), bound)
