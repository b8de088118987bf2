"""The choice of the next token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.sampler import Sampler
from polydelta.engine.sequence import SampledToken, Sequence
from polydelta.kernels.reference import ReferenceKernels

VOCABULARY = 400


def sequence(prompt: Seq[int] = (1,), output: Seq[int] = (), **params: Any) -> Sequence:
    made = Sequence(GenerationRequest("r", prompt, SamplingParams(**params)), lambda output: None)
    made.token_ids += output
    return made


def random_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def sample_all(
    logits: Tensor, rows: Seq[Sequence], sampler: Sampler | None = None
) -> list[SampledToken]:
    return (sampler or Sampler(ReferenceKernels())).sample(logits.clone(), rows).wait()


def sample_one(logits: Tensor, one: Sequence, sampler: Sampler | None = None) -> SampledToken:
    return sample_all(logits[None], [one], sampler)[0]


def draws(logits: Tensor, count: int, **params: Any) -> list[int]:
    """Tokens that one sequence draws from the same logits again and again."""
    sampler, one = Sampler(ReferenceKernels()), sequence(seed=5, **params)
    return [sample_one(logits, one, sampler).token_id for _ in range(count)]


def adjusted(logits: Tensor, one: Sequence) -> Tensor:
    """Log probabilities after penalties and biases, as reported."""
    vocabulary = len(logits)
    top = dict(sample_one(logits, one).logprob.top)
    return torch.tensor([top[token] for token in range(vocabulary)])


def test_an_empty_batch_has_no_tokens() -> None:
    assert sample_all(torch.empty(0, VOCABULARY), []) == []


def test_greedy_takes_the_likeliest_token() -> None:
    logits = random_logits(6)
    rows = [sequence(temperature=0.0, top_k=3, top_p=0.2) for _ in range(6)]
    tokens = sample_all(logits, rows)
    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


def test_tokens_are_on_the_device_before_they_are_waited_for() -> None:
    logits = random_logits(5)
    rows = [sequence(temperature=float(row % 2), seed=row, logprobs=1) for row in range(5)]
    sampled = Sampler(ReferenceKernels()).sample(logits, rows)
    assert sampled.tokens.dtype == torch.int64
    assert sampled.tokens.tolist() == [token.token_id for token in sampled.wait()]
    assert sampled.wait() == sampled.wait()


def test_rows_of_every_kind_share_a_batch() -> None:
    logits = random_logits(4)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.3, "seed": 1},
        {"temperature": 0.7, "seed": 2, "top_k": 5, "logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 2.0},
    ]
    together = sample_all(logits, [sequence(**kind) for kind in kinds])
    alone = [sample_one(row, sequence(**kind)) for row, kind in zip(logits, kinds, strict=True)]
    assert together == alone


@pytest.mark.parametrize("others", [0, 1, 5])
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(others: int) -> None:
    logits = random_logits(12)
    sampler, one = Sampler(ReferenceKernels()), sequence(seed=42)
    tokens = []
    for step, row in enumerate(logits):
        neighbours = [sequence(seed=step * 10 + n) for n in range(others)]
        place = step % (others + 1)
        rows = [*neighbours[:place], one, *neighbours[place:]]
        batch = random_logits(others + 1, seed=step + 1)
        batch[place] = row
        tokens.append(sample_all(batch, rows, sampler)[place].token_id)
    sampler, again = Sampler(ReferenceKernels()), sequence(seed=42)
    assert tokens == [sample_one(row, again, sampler).token_id for row in logits]


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    logits = random_logits(1)[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = draws(logits, 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert draws(logits, 20) == one


def test_different_seeds_and_no_seed_draw_differently() -> None:
    logits = torch.zeros(VOCABULARY)
    streams = []
    for seed in (1, 2, None, None):
        sampler, one = Sampler(ReferenceKernels()), sequence(seed=seed)
        streams.append(tuple(sample_one(logits, one, sampler).token_id for _ in range(10)))
    assert len(set(streams)) == 4


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63), 2**64 - 1])
def test_seeds_at_the_ends_of_64_bits_are_taken(seed: int) -> None:
    assert 0 <= sample_one(random_logits(1)[0], sequence(seed=seed)).token_id < VOCABULARY


def test_a_forgotten_sequence_begins_its_stream_anew() -> None:
    logits = torch.zeros(VOCABULARY)
    sampler, one = Sampler(ReferenceKernels()), sequence(seed=3)
    first = [sample_one(logits, one, sampler).token_id for _ in range(5)]
    sampler.forget(one)
    sampler.forget(one)
    assert [sample_one(logits, one, sampler).token_id for _ in range(5)] == first


def draw_at(number: float, logits: Tensor, one: Sequence) -> int:
    """The token that is drawn where the random stream says `number`."""
    sampler = Sampler(ReferenceKernels())
    sampler._uniform = lambda _: number
    return sample_one(logits, one, sampler).token_id


def allowed(logits: Tensor, **params: Any) -> set[int]:
    """Tokens that can be drawn: halves the unit interval until both ends give the same, as tokens
    come in the order of their ids."""
    one = sequence(**params)
    ends = [0.0, 1.0 - 2**-53]
    low, high = (draw_at(end, logits, one) for end in ends)
    found, parts = {low, high}, [(ends[0], low, ends[1], high)]
    while parts:
        start, low, stop, high = parts.pop()
        if low == high or stop - start < 1e-7:
            continue
        middle = (start + stop) / 2
        between = draw_at(middle, logits, one)
        assert low <= between <= high
        found.add(between)
        parts += [(start, low, middle, between), (middle, between, stop, high)]
    return found


def expected_support(logits: Tensor, temperature: float, k: int, p: float, m: float) -> set[int]:
    """The definition: k likeliest; of these, the fewest that reach p; of these, at least m times
    the likeliest."""
    weights = {t: math.exp(x / temperature) for t, x in enumerate(logits.double().tolist())}
    ranked = sorted(weights, key=lambda t: -weights[t])[: k or None]
    total = sum(weights[t] for t in ranked)
    nucleus, reached = [], 0.0
    for token in ranked:
        if reached >= p * total:
            break
        nucleus.append(token)
        reached += weights[token]
    return {t for t in nucleus if weights[t] >= m * weights[ranked[0]]}


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 7, 30]),
    top_p=st.sampled_from([0.05, 0.4, 0.83, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.6]),
)
def test_only_tokens_that_the_cuts_leave_are_ever_drawn_and_all_of_them(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    # Few tokens and small differences, so that each one's share of the interval is found.
    logits = random_logits(1, seed, vocabulary=12)[0] / 3
    got = allowed(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert got == expected_support(logits, temperature, top_k, top_p, min_p)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"top_k": 1}, [TopKLogitsWarper(1)]),
        ({"top_k": 37}, [TopKLogitsWarper(37)]),
        ({"top_p": 0.3}, [TopPLogitsWarper(0.3)]),
        ({"top_p": 0.95}, [TopPLogitsWarper(0.95)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),
        ({"min_p": 0.02}, [MinPLogitsWarper(0.02)]),
        (
            {"top_k": 60, "top_p": 0.9, "min_p": 0.05},
            [TopKLogitsWarper(60), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_cuts_are_those_of_transformers(
    params: dict[str, Any], warpers: list[Any], temperature: float, flat: bool
) -> None:
    """Flat logits need more tokens than the sampler's first look at the likeliest 256."""
    logits = random_logits(1, seed=9, vocabulary=2000)[0] * (0.1 if flat else 1.0)
    scores = logits[None] / temperature
    for warper in warpers:
        scores = warper(None, scores)
    theirs = scores[0].softmax(-1).double()
    cumulative = theirs.cumsum(-1)
    one = sequence(temperature=temperature, **params)
    for number in torch.linspace(0.0005, 0.9995, 300, dtype=torch.float64).tolist():
        token = draw_at(number, logits, one)
        assert theirs[token] > 0
        # Theirs would draw it for this number too, or for one that differs by rounding.
        assert cumulative[token] > number - 1e-6
        assert cumulative[token] - theirs[token] < number + 1e-6


@pytest.mark.parametrize("number", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_may_be_drawn(number: float) -> None:
    logits = random_logits(1, seed=4)[0]
    logits[0] = logits[-1] = -1000.0
    token = draw_at(number, logits, sequence(top_k=5))
    assert token in logits.topk(5).indices.tolist()


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    logits = random_logits(1, seed=8)[0]
    assert set(draws(logits, 20, temperature=temperature)) == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float) -> None:
    logits = random_logits(1, seed=6, vocabulary=20)[0] / 3
    count = 4000
    drawn = Counter(draws(logits, count, temperature=temperature))
    wanted = (logits.double() / temperature).softmax(-1) * count
    chi_square = sum((drawn[t] - float(wanted[t])) ** 2 / float(wanted[t]) for t in range(20))
    # 19 degrees of freedom: the 99.9th percentile is 43.8.
    assert chi_square < 43.8


def test_the_cuts_keep_the_proportions_of_what_they_leave() -> None:
    logits = random_logits(1, seed=6, vocabulary=20)[0] / 3
    count = 4000
    drawn = Counter(draws(logits, count, top_k=6))
    top = logits.double().topk(6)
    wanted = top.values.softmax(-1) * count
    pairs = zip(top.indices.tolist(), wanted.tolist(), strict=True)
    # 5 degrees of freedom: the 99.9th percentile is 20.5.
    assert sum((drawn[t] - w) ** 2 / w for t, w in pairs) < 20.5
    assert sum(drawn.values()) == sum(drawn[t] for t in top.indices.tolist())


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(1, vocabulary=50)[0]
    one = sequence([3, 4, 4], [7, 3], repetition_penalty=penalty, temperature=0.0, logprobs=50)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([[3, 4, 4, 7, 3]]), logits[None]
    )
    torch.testing.assert_close(adjusted(logits, one), theirs[0].log_softmax(-1))


def test_presence_and_frequency_penalties_look_at_the_output_only() -> None:
    logits = random_logits(1, vocabulary=50)[0]
    penalties = {"presence_penalty": 0.6, "frequency_penalty": 0.25}
    one = sequence([3, 4], [7, 7, 9], temperature=0.0, logprobs=50, **penalties)
    expected = logits.clone()
    expected[7] -= 0.6 + 2 * 0.25
    expected[9] -= 0.6 + 0.25
    torch.testing.assert_close(adjusted(logits, one), expected.log_softmax(-1))


def test_negative_penalties_reward() -> None:
    logits = torch.zeros(50)
    one = sequence([1], [7], temperature=0.0, presence_penalty=-1.0)
    assert sample_one(logits, one).token_id == 7


def test_penalties_without_any_output_change_nothing() -> None:
    logits = random_logits(1, vocabulary=50)[0]
    one = sequence([3], temperature=0.0, presence_penalty=2.0, logprobs=50)
    torch.testing.assert_close(adjusted(logits, one), logits.log_softmax(-1))


def test_all_penalties_and_biases_together_follow_their_formulas() -> None:
    logits = random_logits(1, vocabulary=50)[0]
    one = sequence(
        [3, 4],
        [7, 7],
        temperature=0.0,
        logprobs=50,
        repetition_penalty=1.5,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={7: 4.0, 11: -2.5},
    )
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[3, 4, 7]]), logits[None])[0]
    expected[7] += 4.0 - 0.3 - 2 * 0.2
    expected[11] -= 2.5
    torch.testing.assert_close(adjusted(logits, one), expected.log_softmax(-1))


def test_a_bias_forces_and_forbids_tokens() -> None:
    logits = random_logits(1)[0]
    worst = int(logits.argmin())
    assert sample_one(logits, sequence(logit_bias={worst: 100.0}, seed=1)).token_id == worst
    best = int(logits.argmax())
    assert best not in draws(logits, 50, logit_bias={best: -100})


def test_one_rows_penalties_and_biases_leave_the_others_alone() -> None:
    logits = random_logits(3)
    rows = [
        sequence(temperature=0.0, logprobs=0),
        sequence([5], [6], temperature=0.0, repetition_penalty=9.0, logit_bias={1: 50.0}),
        sequence(temperature=0.0, logprobs=0),
    ]
    tokens = sample_all(logits, rows)
    for row in (0, 2):
        assert tokens[row] == sample_one(logits[row], sequence(temperature=0.0, logprobs=0))


@pytest.mark.parametrize("wanted", [0, 1, 5])
def test_log_probabilities_are_those_before_temperature_and_cuts(wanted: int) -> None:
    logits = random_logits(1)[0]
    one = sequence(seed=1, temperature=1.9, top_k=9, logprobs=wanted)
    logprob = sample_one(logits, one).logprob
    truth = logits.log_softmax(-1)
    assert logprob.logprob == pytest.approx(float(truth[logprob.token_id]), abs=1e-5)
    best = truth.topk(wanted)
    assert [token for token, _ in logprob.top] == best.indices.tolist()
    assert [value for _, value in logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_rows_that_want_different_numbers_of_log_probabilities_share_a_batch() -> None:
    logits = random_logits(4)
    wanted = [2, None, 0, 5]
    rows = [sequence(temperature=0.0, logprobs=count) for count in wanted]
    tokens = sample_all(logits, rows)
    assert [token.logprob and len(token.logprob.top) for token in tokens] == wanted
    assert tokens == [sample_one(row, one) for row, one in zip(logits, rows, strict=True)]


def test_no_log_probabilities_are_reported_unless_asked_for() -> None:
    assert sample_one(random_logits(1)[0], sequence()).logprob is None
