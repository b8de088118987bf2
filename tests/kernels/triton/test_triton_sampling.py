"""The draw without a sort, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings, strategies as st
from torch import Tensor

from polydelta.kernels import sampling as reference
from polydelta.kernels.sampling import SamplingRows
from polydelta.kernels.triton import sampling
from polydelta.kernels.triton.sampling import largest_logit, least_kept

BLOCK = 1024
# Temperature, top-k, top-p, min-p.
Cuts = tuple[float, float, float, float]


@triton.jit
def _least_kept(logits_ptr, cuts_ptr, out_ptr, size, block: tl.constexpr):
    """What `least_kept` says of one row."""
    sharpness = 1.0 / tl.load(cuts_ptr)
    top_k, top_p, min_p = tl.load(cuts_ptr + 1), tl.load(cuts_ptr + 2), tl.load(cuts_ptr + 3)
    largest = largest_logit(logits_ptr, size, block)
    least = least_kept(logits_ptr, size, largest, sharpness, top_k, top_p, min_p, block)
    tl.store(out_ptr, least)


def least_weight(logits: Tensor, cuts: Cuts) -> float:
    least = torch.empty(1, device=logits.device)
    on_device = torch.tensor(cuts, device=logits.device)
    _least_kept[1,](logits, on_device, least, len(logits), block=BLOCK)
    return float(least)


def kept(logits: Tensor, cuts: Cuts) -> list[int]:
    """Tokens with a weight that Triton's version does not cut off."""
    weights = ((logits - logits.max()) / cuts[0]).exp()
    # The last bits of a weight are others here than there.
    stays = (weights >= least_weight(logits, cuts) * (1.0 - 1e-6)) & (weights > 0)
    return stays.nonzero().flatten().tolist()


def kept_by_reference(logits: Tensor, cuts: Cuts) -> list[int]:
    return reference.kept(logits.cpu(), *cuts).nonzero().flatten().tolist()


def random_logits(size: int, seed: int, step: float, device: torch.device) -> Tensor:
    """Multiples of a step, so that many are alike and none are nearly alike."""
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
    return ((noise / step).round() * step).to(device)


def rows_of(
    uniforms: Tensor, temperature: float, top_k: float, top_p: float, min_p: float
) -> SamplingRows:
    """The same cuts for each number."""
    same = (torch.full_like(uniforms, value) for value in (temperature, top_k, top_p, min_p))
    return SamplingRows(*same, uniforms)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 63, 1000, 1024, 1025, 3001]),
    step=st.sampled_from([2.0, 0.5, 2.0**-7]),
    temperature=st.sampled_from([0.5, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 300, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.9, 0.997]),
    min_p=st.sampled_from([0.0, 0.0, 0.03, 0.7]),
)
def test_the_cuts_leave_what_those_of_the_reference_leave(
    device: torch.device,
    seed: int,
    size: int,
    step: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits = random_logits(size, seed, step, device)
    cuts = (temperature, float(top_k), top_p, min_p)
    assert kept(logits, cuts) == kept_by_reference(logits, cuts)


@pytest.mark.parametrize("top_k", [0, 1, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.0])
def test_logits_that_are_all_alike_stay_or_go_together(
    device: torch.device, top_k: int, top_p: float
) -> None:
    logits = torch.full((1500,), -3.25, device=device)
    assert kept(logits, (0.7, top_k, top_p, 0.0)) == list(range(1500))


@pytest.mark.parametrize("cuts", [(1.0, 5, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 3, 0.9, 0.2)])
def test_tokens_that_are_forbidden_are_no_candidates(device: torch.device, cuts: Cuts) -> None:
    logits = torch.full((1030,), -math.inf, device=device)
    logits[7], logits[500], logits[1029] = 1.0, 3.0, 2.5
    assert kept(logits, cuts) == kept_by_reference(logits, cuts)


def test_weights_that_differ_in_the_last_bit_are_told_apart(device: torch.device) -> None:
    logits = torch.tensor([-(2.0**-24), 0.0, -(2.0**-24), -3.0], device=device)
    assert least_weight(logits, (1.0, 1, 1.0, 0.0)) == 1.0
    assert least_weight(logits, (1.0, 3, 1.0, 0.0)) >= 1.0 - 2.0**-24
    assert least_weight(logits, (1.0, 0, 0.1, 0.0)) == 1.0


def test_a_number_between_two_shares_is_the_second_ones(device: torch.device) -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0, -math.inf]], device=device)
    numbers = torch.tensor([0.0, 0.49, 0.5, 0.51], dtype=torch.float64, device=device)
    drawn = sampling.sample(logits.expand(4, -1), rows_of(numbers, 1.0, 0, 1.0, 0.0))
    assert drawn.tolist() == [1, 1, 3, 3]


def test_logits_far_apart_leave_the_largest(device: torch.device) -> None:
    logits = torch.tensor([-1e30, 3e38, 5.0, -3e38], device=device)
    for cuts in ((1.0, 2, 1.0, 0.0), (1.0, 0, 0.999, 0.0), (1e-6, 0, 1.0, 0.0)):
        assert kept(logits, cuts) == [1]


@pytest.mark.parametrize("size", [5, 517, 8192, 8193, 20001])
@pytest.mark.parametrize("cuts", [(1.0, 0, 1.0, 0.0), (0.8, 9, 1.0, 0.0), (1.3, 0, 0.7, 0.01)])
def test_the_share_of_the_drawn_token_has_the_number(
    device: torch.device, size: int, cuts: Cuts
) -> None:
    """Tokens in the order of their ids share the unit interval."""
    logits = random_logits(size, 3, 0.25, device)
    ends = [0.0, 1.0 - 2**-53]
    uniforms = torch.tensor([*ends, *torch.rand(10).tolist()], dtype=torch.float64, device=device)
    rows = rows_of(uniforms, *cuts)
    tokens = sampling.sample(logits.expand(len(rows.uniform), -1), rows).cpu()
    shares = reference.kept(logits.cpu(), *cuts).double()
    assert (shares[tokens] > 0).all()
    stops = (shares.cumsum(-1) / shares.sum())[tokens]
    starts = stops - (shares / shares.sum())[tokens]
    assert (starts - 1e-6 <= uniforms.cpu()).all()
    assert (uniforms.cpu() <= stops + 1e-6).all()


def test_rows_have_cuts_of_their_own_and_may_lie_apart(device: torch.device) -> None:
    logits = torch.stack([random_logits(701, seed, 0.5, device) for seed in range(6)])
    logits = torch.nn.functional.pad(logits, (0, 3), value=99.0)[:, :701]
    columns = torch.tensor(
        [
            [1.0, 0.5, 2.0, 1e-9, 1.0, 0.9],
            [0, 1, 30, 0, 5, 0],
            [1.0, 1.0, 0.8, 1.0, 1e-4, 0.95],
            [0.0, 0.0, 0.0, 0.0, 0.5, 0.1],
            [0.3, 0.9, 0.55, 0.2, 0.7, 0.61],
        ],
        dtype=torch.float64,
    )
    tokens = sampling.sample(logits, SamplingRows(*columns.to(device)))
    expected = reference.sample(logits.cpu(), SamplingRows(*columns))
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected.tolist()


def test_a_small_share_at_the_end_of_a_large_vocabulary_is_drawn(device: torch.device) -> None:
    """In a float32 sum it would be lost."""
    logits = torch.zeros(1, 151_937, device=device)
    logits[0, -1] = -9.0
    numbers = torch.tensor([1.0 - 1e-10], dtype=torch.float64, device=device)
    assert sampling.sample(logits, rows_of(numbers, 1.0, 0, 1.0, 0.0)).tolist() == [151_936]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_still_give_a_token(device: torch.device, wrong: float) -> None:
    """What it is used for next must not reach beyond the embedding."""
    logits = torch.full((1, 300), wrong, device=device)
    for cuts in ((1.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.1)):
        rows = rows_of(torch.tensor([0.5], dtype=torch.float64, device=device), *cuts)
        assert 0 <= sampling.sample(logits, rows).item() < 300
