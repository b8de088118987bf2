"""The draw of a token by the reference, against its definition in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.reference import ReferenceKernels
from polydelta.kernels.sampling import SamplingRows, kept, sample


def random_logits(size: int, seed: int, step: float) -> Tensor:
    """Multiples of a step, so that many are alike and none are nearly alike."""
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2
    return (noise / step).round() * step


def expected(logits: Tensor, temperature: float, k: int, p: float, m: float) -> set[int]:
    """The k likeliest and those as likely as the last of them; of these, the fewest likeliest that
    reach the share p, and those as likely as the last; of these, at least m times the likeliest."""
    weights = [math.exp(x / temperature) for x in logits.double().tolist()]
    ranked = sorted(weights, reverse=True)
    least = ranked[min(k or len(ranked), len(ranked)) - 1]
    ranked = [weight for weight in ranked if weight >= least]
    reached, total = 0.0, sum(ranked)
    for weight in ranked:
        reached += weight
        if p < 1.0 and reached >= p * total:
            least = weight
            break
    least = max(least, m * ranked[0])
    return {token for token, weight in enumerate(weights) if weight >= least}


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 31, 700]),
    step=st.sampled_from([2.0, 0.5, 2.0**-7]),
    temperature=st.sampled_from([0.5, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 2, 7, 300, 5000]),
    top_p=st.sampled_from([1.0, 1e-6, 0.3, 0.9, 0.997]),
    min_p=st.sampled_from([0.0, 0.03, 0.7]),
)
def test_the_cuts_follow_their_definition(
    seed: int, size: int, step: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(size, seed, step)
    stay = kept(logits, temperature, top_k, top_p, min_p).nonzero().flatten().tolist()
    assert set(stay) == expected(logits, temperature, top_k, top_p, min_p)


def test_what_stays_keeps_its_probability() -> None:
    logits = random_logits(50, 1, 0.5)
    probabilities, left = logits.softmax(-1), kept(logits, 1.0, 9, 1.0, 0.0)
    assert torch.equal(left[left > 0], probabilities[left > 0])


@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("top_k", [0, 1, 40])
def test_logits_that_are_all_alike_stay_or_go_together(top_k: int, top_p: float) -> None:
    assert (kept(torch.full((500,), -3.25), 0.7, top_k, top_p, 0.0) > 0).all()


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0, -math.inf]])
    numbers = torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0 - 2**-53], dtype=torch.float64)
    assert sample(logits.expand(5, -1), rows_of(numbers)).tolist() == [1, 1, 3, 3, 3]


def rows_of(
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: float = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> SamplingRows:
    """The same cuts for each number."""
    same = (torch.full_like(uniforms, value) for value in (temperature, top_k, top_p, min_p))
    return SamplingRows(*same, uniforms)


@pytest.mark.parametrize("cuts", [(1.0, 0, 1.0, 0.0), (0.8, 9, 1.0, 0.0), (1.3, 0, 0.7, 0.01)])
def test_the_share_of_the_drawn_token_has_the_number(
    cuts: tuple[float, float, float, float],
) -> None:
    """Tokens in the order of their ids share the unit interval."""
    logits = random_logits(517, 3, 0.25)
    uniforms = torch.tensor([0.0, 1.0 - 2**-53, *torch.rand(40).tolist()], dtype=torch.float64)
    tokens = sample(logits.expand(len(uniforms), -1), rows_of(uniforms, *cuts))
    shares = kept(logits, *cuts).double()
    assert (shares[tokens] > 0).all()
    stops = (shares.cumsum(-1) / shares.sum())[tokens]
    starts = stops - (shares / shares.sum())[tokens]
    assert (starts - 1e-12 <= uniforms).all()
    assert (uniforms <= stops + 1e-12).all()


def test_rows_have_cuts_of_their_own() -> None:
    logits = torch.stack([random_logits(71, seed, 0.5) for seed in range(4)])
    columns = torch.tensor(
        [
            [1.0, 0.5, 2.0, 1e-9],
            [0, 1, 30, 0],
            [0.4, 1.0, 0.8, 1.0],
            [0.0, 0.0, 0.1, 0.0],
            [0.3, 0.9, 0.55, 0.2],
        ],
        dtype=torch.float64,
    )
    together = sample(logits, SamplingRows(*columns))
    alone = [sample(logits[row, None], SamplingRows(*columns[:, row, None])) for row in range(4)]
    assert together.dtype == torch.int64
    assert together.tolist() == torch.cat(alone).tolist()
    assert together[1] == logits[1].argmax()


def test_kernels_of_the_cpu_draw_as_the_reference() -> None:
    logits = torch.stack([random_logits(301, seed, 0.5) for seed in range(5)])
    rows = rows_of(torch.rand(5, dtype=torch.float64), 0.9, 40, 0.9)
    drawn = sample(logits, rows)
    assert torch.equal(ReferenceKernels().sample(logits, rows), drawn)
    assert torch.equal(CpuKernels().sample(logits, rows), drawn)
