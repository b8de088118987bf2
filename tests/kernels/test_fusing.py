"""Deltas in the weight of the reference's linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polydelta.kernels.delta_weights import LowRankBlock, LowRankWeights, SparseWeights
from polydelta.kernels.fusing import entry_rows, with_deltas
from polydelta.kernels.ops import FusableLinear
from polydelta.kernels.reference import ReferenceKernels

KERNELS = ReferenceKernels()
OUT, IN = 11, 7


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def low_rank(dtype: torch.dtype = torch.float32) -> LowRankWeights:
    """Ranks 2 and 3 on rows 1 to 5 and 6 to 11: row 0 and row 5 are nobody's."""
    blocks = (
        LowRankBlock(1, 0, torch.randn(2, 4).to(dtype)),
        LowRankBlock(6, 2, torch.randn(3, 5).to(dtype)),
    )
    return LowRankWeights(torch.randn(5, IN).to(dtype), blocks)


def sparse(dtype: torch.dtype = torch.float32) -> SparseWeights:
    """Three entries, in rows 0 and 4."""
    pointers = torch.tensor([0, 1, 1, 1, 1, *[3] * (OUT - 4)], dtype=torch.int32)
    columns = torch.tensor([6, 0, 3], dtype=torch.int32)
    return SparseWeights(pointers, columns, torch.randn(3).to(dtype))


def dense(delta: LowRankWeights | SparseWeights) -> Tensor:
    """dW `[out, in]` in float64, entry by entry."""
    change = torch.zeros(OUT, IN, dtype=torch.float64)
    if isinstance(delta, LowRankWeights):
        for block in delta.blocks:
            for rank, row in enumerate(block.b_t.double()):
                for place, value in enumerate(row):
                    change[block.out_start + place] += (
                        value * delta.a[block.rank_start + rank].double()
                    )
    else:
        for row in range(OUT):
            for entry in range(int(delta.row_pointers[row]), int(delta.row_pointers[row + 1])):
                change[row, delta.columns[entry]] += delta.values[entry].double()
    return change


def test_entries_know_their_rows() -> None:
    assert entry_rows(sparse()).tolist() == [0, 4, 4]


def test_the_sum_is_that_of_all_deltas_and_the_weight_is_not_written_to() -> None:
    weight = torch.randn(OUT, IN)
    before = weight.clone()
    deltas = [low_rank(), sparse(), sparse()]
    expected = weight.double() + sum(map(dense, deltas))
    torch.testing.assert_close(with_deltas(weight, deltas).double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(weight, before)


def test_a_sum_in_bfloat16_is_rounded_once() -> None:
    """1 + 3 * 2^-9: rounded after each addend it would stay 1."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    pointers, columns = torch.tensor([0, 1]).int(), torch.tensor([0]).int()
    small = SparseWeights(pointers, columns, torch.tensor([2**-9]).bfloat16())
    assert with_deltas(weight, [small] * 3).item() == 1 + 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_was_fused_is_taken_out_to_the_last_bit(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(OUT, IN).to(dtype), torch.randn(OUT).to(dtype)
    before = weight.clone()
    linear = KERNELS.linear(weight, bias)
    delta = linear.prepare([low_rank(dtype), sparse(dtype)])
    x = torch.randn(5, IN).to(dtype)
    plain = linear(x)
    delta.fuse()
    assert not torch.equal(linear(x), plain)
    delta.unfuse()
    assert torch.equal(linear(x), plain)
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("make", [low_rank, sparse])
def test_fused_equals_unmerged(make: type) -> None:
    delta, x = make(), torch.randn(5, IN)
    linear = KERNELS.linear(torch.randn(OUT, IN), torch.randn(OUT))
    unmerged = linear(x)
    KERNELS.add_delta(delta)(unmerged, x)
    linear.prepare([delta]).fuse()
    torch.testing.assert_close(linear(x), unmerged, rtol=0, atol=1e-5 * float(unmerged.abs().max()))


def test_a_weight_holds_one_delta_at_a_time() -> None:
    linear = KERNELS.linear(torch.randn(OUT, IN), None)
    first, second = linear.prepare([sparse()]), linear.prepare([low_rank()])
    with pytest.raises(RuntimeError, match="not in the layer's weight"):
        first.unfuse()
    first.fuse()
    for delta in (first, second):
        with pytest.raises(RuntimeError, match="take it out first"):
            delta.fuse()
    with pytest.raises(RuntimeError, match="not in the layer's weight"):
        second.unfuse()
    first.unfuse()
    second.fuse()


def test_a_layer_can_be_told_from_a_function_around_it() -> None:
    linear = KERNELS.linear(torch.randn(OUT, IN), None)
    assert isinstance(linear, FusableLinear)
    assert not isinstance(lambda x: linear(x), FusableLinear)
