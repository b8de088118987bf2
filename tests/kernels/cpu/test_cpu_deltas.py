"""Adapter deltas on a CPU against the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu import deltas
from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.delta_weights import LowRankBlock, LowRankWeights, SparseWeights
from polydelta.kernels.reference import ReferenceKernels

Near = Callable[[Tensor, Tensor, torch.dtype], None]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Around the number of rows where a bfloat16 delta changes its way of computing.
ROWS = pytest.mark.parametrize("rows", [1, 2, 9, 16, 17, 31])
IN, OUT = 45, 70


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def low_rank(
    dtype: torch.dtype, blocks: Sequence[tuple[int, int, int, int]], ranks: int, padding: int = 0
) -> LowRankWeights:
    """blocks: (out_start, out_features, rank_start, rank). All lies in one piece of memory, as in
    an adapter's pages: after something else, with `padding` elements at the end of each row."""
    sizes = [(ranks, IN), *((rank, out) for _, out, _, rank in blocks)]
    begin = 7
    memory = torch.randn(begin + sum(r * (c + padding) for r, c in sizes)).to(dtype)
    views, offset = [], begin
    for rows, columns in sizes:
        stride = columns + padding
        views.append(memory.as_strided((rows, columns), (stride, 1), offset))
        offset += rows * stride
    made = [
        LowRankBlock(out_start, rank_start, view)
        for (out_start, _, rank_start, _), view in zip(blocks, views[1:], strict=True)
    ]
    return LowRankWeights(views[0], tuple(made))


def widened(weights: LowRankWeights) -> LowRankWeights:
    """The same numbers in float64."""
    blocks = tuple(LowRankBlock(b.out_start, b.rank_start, b.b_t.double()) for b in weights.blocks)
    return LowRankWeights(weights.a.double(), blocks)


def check_low_rank(near: Near, y: Tensor, x: Tensor, weights: LowRankWeights) -> None:
    expected = y.double()
    ReferenceKernels().add_delta(widened(weights))(expected, x.double())
    without_compiler = y.clone()
    CpuKernels().add_delta(weights)(y, x)
    near(y, expected, y.dtype)
    deltas.add_delta(weights, None)(without_compiler, x)
    near(without_compiler, expected, y.dtype)


@DTYPES
@ROWS
@pytest.mark.parametrize("rank", [1, 3, 12, 64])
@pytest.mark.parametrize("padding", [0, 3])
def test_low_rank_agrees_with_the_reference(
    near: Near, dtype: torch.dtype, rows: int, rank: int, padding: int
) -> None:
    weights = low_rank(dtype, [(0, OUT, 0, rank)], rank, padding)
    y, x = torch.randn(rows, OUT).to(dtype), torch.randn(rows, IN).to(dtype)
    check_low_rank(near, y, x, weights)


@DTYPES
@ROWS
def test_blocks_that_cover_a_part_of_the_outputs_leave_the_rest_alone(
    near: Near, dtype: torch.dtype, rows: int
) -> None:
    """As of q and v in a fused qkv: ranks 3 and 12, and a gap between them."""
    weights = low_rank(dtype, [(2, 20, 0, 3), (41, 17, 3, 12)], 15)
    y, x = torch.randn(rows, OUT).to(dtype), torch.randn(rows, IN).to(dtype)
    before = y.clone()
    check_low_rank(near, y, x, weights)
    for gap in (slice(0, 2), slice(22, 41), slice(58, None)):
        assert torch.equal(y[:, gap], before[:, gap])
    assert not torch.equal(y, before)


@DTYPES
@ROWS
def test_blocks_may_share_the_rows_of_a(near: Near, dtype: torch.dtype, rows: int) -> None:
    weights = low_rank(dtype, [(0, 30, 0, 5), (30, 40, 0, 5)], 5)
    y, x = torch.randn(rows, OUT).to(dtype), torch.randn(rows, IN).to(dtype)
    check_low_rank(near, y, x, weights)


@DTYPES
@ROWS
def test_low_rank_adds_to_some_rows_and_columns_of_a_larger_tensor(
    near: Near, dtype: torch.dtype, rows: int
) -> None:
    weights = low_rank(dtype, [(0, 30, 0, 3), (30, 40, 3, 4)], 7)
    whole_y = torch.randn(rows + 5, OUT + 9).to(dtype)
    whole_x = torch.randn(rows + 5, IN + 4).to(dtype)
    before = whole_y.clone()
    inner = (slice(2, 2 + rows), slice(5, 5 + OUT))
    check_low_rank(near, whole_y[inner], whole_x[2 : 2 + rows, 1 : 1 + IN], weights)
    assert not torch.equal(whole_y[inner], before[inner])
    whole_y[inner] = before[inner]
    assert torch.equal(whole_y, before)


@DTYPES
def test_a_wrong_row_would_be_noticed(near: Near, dtype: torch.dtype) -> None:
    weights = low_rank(dtype, [(0, OUT, 0, 3)], 3)
    y, x = torch.randn(9, OUT).to(dtype), torch.randn(9, IN).to(dtype)
    expected = y.double()
    ReferenceKernels().add_delta(widened(weights))(expected, x.double())
    expected[4] = expected[5]
    CpuKernels().add_delta(weights)(y, x)
    with pytest.raises(AssertionError, match=r"rows \[4\]"):
        near(y, expected, dtype)


def sparse(dtype: torch.dtype, dense: Tensor) -> SparseWeights:
    csr = dense.to_sparse_csr()
    columns, values = csr.col_indices().int(), csr.values().to(dtype)
    return SparseWeights(csr.crow_indices().int(), columns, values)


def check_sparse(near: Near, y: Tensor, x: Tensor, weights: SparseWeights) -> None:
    expected = y.double()
    wide = SparseWeights(weights.row_pointers, weights.columns, weights.values.double())
    ReferenceKernels().add_delta(wide)(expected, x.double())
    CpuKernels().add_delta(weights)(y, x)
    near(y, expected, y.dtype)


@DTYPES
@ROWS
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_sparse_agrees_with_the_reference(
    near: Near, dtype: torch.dtype, rows: int, density: float
) -> None:
    dense = torch.randn(OUT, IN) * (torch.rand(OUT, IN) < density)
    dense[[0, 13, OUT - 1]] = 0.0
    y, x = torch.randn(rows, OUT).to(dtype), torch.randn(rows, IN).to(dtype)
    check_sparse(near, y, x, sparse(dtype, dense))


@DTYPES
@ROWS
def test_a_sparse_delta_without_entries_changes_nothing(dtype: torch.dtype, rows: int) -> None:
    y, x = torch.randn(rows, OUT).to(dtype), torch.randn(rows, IN).to(dtype)
    before = y.clone()
    CpuKernels().add_delta(sparse(dtype, torch.zeros(OUT, IN)))(y, x)
    assert torch.equal(y, before)


@DTYPES
@pytest.mark.parametrize("place", [(0, 0), (OUT - 1, IN - 1), (17, 3)])
def test_a_single_entry_lands_in_its_own_output(
    near: Near, dtype: torch.dtype, place: tuple[int, int]
) -> None:
    dense = torch.zeros(OUT, IN)
    dense[place] = 2.0
    y, x = torch.zeros(3, OUT, dtype=dtype), torch.randn(3, IN).to(dtype)
    check_sparse(near, y, x, sparse(dtype, dense))
    assert torch.equal(y[:, place[0]], 2 * x[:, place[1]])


@DTYPES
@ROWS
def test_sparse_adds_to_some_rows_of_a_larger_tensor(
    near: Near, dtype: torch.dtype, rows: int
) -> None:
    weights = sparse(dtype, torch.randn(OUT, IN) * (torch.rand(OUT, IN) < 0.1))
    whole_y, whole_x = torch.randn(rows + 5, OUT).to(dtype), torch.randn(rows + 5, IN).to(dtype)
    before = whole_y.clone()
    inner = slice(3, 3 + rows)
    check_sparse(near, whole_y[inner], whole_x[inner], weights)
    assert not torch.equal(whole_y[inner], before[inner])
    whole_y[inner] = before[inner]
    assert torch.equal(whole_y, before)
