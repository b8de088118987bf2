"""Low-rank deltas of 8 and 4 bits on a CPU: compiled for few rows, by torch for many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.row_codes import quantize_rows
from polydelta.kernels.cpu import deltas
from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.delta_groups import DeltaSegment, OutputBias, SiteDeltas
from polydelta.kernels.delta_weights import (
    LowRankBlock,
    LowRankWeights,
    Matrix,
    QuantizedMatrix,
    SparseWeights,
    dense,
)
from polydelta.kernels.ops import FusableLinear, Kernels
from polydelta.kernels.reference import ReferenceKernels

Near = Callable[[Tensor, Tensor, torch.dtype], None]

BITS = pytest.mark.parametrize("bits", [8, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
BF16 = torch.bfloat16
# Odd, so that the last byte of 4 bits is half empty, and not of whole groups.
IN, OUT = 45, 130


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def quantized(rows: int, columns: int, bits: int) -> QuantizedMatrix:
    """Rows that lie apart, as in a page; what is between them is no code."""
    codes, scales = quantize_rows(torch.randn(rows, columns) / 8, bits)
    apart = torch.full((rows, codes.shape[1] + 11), 77, dtype=codes.dtype)
    apart[:, : codes.shape[1]] = codes
    scales_apart = torch.full((rows, scales.shape[1] + 3), torch.nan).half()
    scales_apart[:, : scales.shape[1]] = scales
    inner = apart[:, : codes.shape[1]], scales_apart[:, : scales.shape[1]]
    return QuantizedMatrix(*inner, columns)


def low_rank(bits: int, *ranks: int) -> LowRankWeights:
    """Parts at odd places, outputs between them that are nobody's."""
    parts = ((2, 37), (41, 33), (80, 49))
    blocks, start = [], 0
    for (out_start, out), rank in zip(parts, ranks, strict=False):
        blocks.append(LowRankBlock(out_start, start, quantized(rank, out, bits)))
        start += rank
    return LowRankWeights(quantized(start, IN, bits), tuple(blocks))


def written(weights: LowRankWeights, dtype: torch.dtype) -> LowRankWeights:
    """The same numbers as plain matrices."""

    def plain(matrix: Matrix) -> Tensor:
        return dense(matrix, dtype).to(dtype)

    blocks = [LowRankBlock(b.out_start, b.rank_start, plain(b.b_t)) for b in weights.blocks]
    return LowRankWeights(plain(weights.a), tuple(blocks))


def widened(weights: LowRankWeights) -> LowRankWeights:
    return written(weights, torch.float64)


def expected_of(weights: LowRankWeights, y: Tensor, x: Tensor) -> Tensor:
    expected = y.double()
    ReferenceKernels().add_delta(widened(weights))(expected, x.double())
    return expected


@BITS
@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
@pytest.mark.parametrize("ranks", [(1,), (3, 12), (8, 1, 64)])
def test_the_product_is_that_of_the_numbers(
    near: Near, bits: int, dtype: torch.dtype, rows: int, ranks: tuple[int, ...]
) -> None:
    weights = low_rank(bits, *ranks)
    y, x = torch.randn(rows, OUT).to(dtype), torch.randn(rows, IN).to(dtype)
    before, without_compiler = y.clone(), y.clone()
    expected = expected_of(weights, y, x)
    CpuKernels().add_delta(weights)(y, x)
    near(y, expected, dtype)
    deltas.add_delta(weights, None)(without_compiler, x)
    near(without_compiler, expected, dtype)
    assert torch.equal(y[:, 39:41], before[:, 39:41])
    assert torch.equal(y[:, :2], before[:, :2])


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-15, 60000.0, -0.5])
@DTYPES
def test_scales_that_are_subnormal_or_negative_count(dtype: torch.dtype, scale: float) -> None:
    def one(code: int, scale: float) -> QuantizedMatrix:
        codes = torch.tensor([[code]], dtype=torch.int8)
        return QuantizedMatrix(codes, torch.tensor([[scale]]).half(), 1)

    weights = LowRankWeights(one(64, scale), (LowRankBlock(0, 0, one(-64, 1 / 64)),))
    y, x = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    CpuKernels().add_delta(weights)(y, x)
    assert y.item() == torch.tensor(-64 * torch.tensor(scale).half().item()).to(dtype).item()


def sparse() -> SparseWeights:
    pointers = torch.tensor([0, *[2] * OUT], dtype=torch.int32)
    return SparseWeights(pointers, torch.tensor([3, 9]).int(), torch.randn(2).bfloat16())


def step(
    kernels: Kernels, sites: list[LowRankWeights], y: Tensor, x: Tensor, linear: FusableLinear
) -> Tensor:
    """One row of each adapter, and two of the last, which has a weight of its own and a bias."""
    bias = [OutputBias(3, torch.arange(9.0))]
    bound = [
        kernels.bind_sites([SiteDeltas(adds=[kernels.add_delta(site)], biases=bias)])
        for site in sites
    ]
    segments = [DeltaSegment(row, row + 1, each) for row, each in enumerate(bound)]
    segments.append(DeltaSegment(len(bound), len(bound) + 2, bound[-1], 0.5))
    group = kernels.group_deltas(segments)
    group.apply(0, y, x)
    return group.multiply(0, linear, x)


@BITS
def test_a_step_may_mix_them_with_adapters_in_the_dtype(
    near: Near, ours: Bfloat16Kernels, bits: int
) -> None:
    sites = [
        low_rank(bits, 5),
        written(low_rank(bits, 4, 4), BF16),
        low_rank(8, 2, 3, 4),
        low_rank(4, 7),
    ]
    weight = torch.randn(OUT, IN).bfloat16() / 8
    y, x = torch.randn(6, OUT).bfloat16(), torch.randn(6, IN).bfloat16()
    expected_y = y.double()
    wide = [widened(site) for site in sites]
    reference = ReferenceKernels()
    expected = step(
        reference, wide, expected_y, x.double(), reference.linear(weight.double(), None)
    )
    near(step(ours, sites, y, x, ours.linear(weight, None)), expected, BF16)
    near(y, expected_y, BF16)


@BITS
@DTYPES
@pytest.mark.parametrize("mixed", [False, True])
def test_a_packed_weight_takes_them_and_gives_every_bit_back(
    near: Near, bits: int, dtype: torch.dtype, mixed: bool
) -> None:
    weights = low_rank(bits, 3, 5)
    weight = torch.randn(OUT, IN).to(dtype) / 8
    linear = CpuKernels().linear(weight, None)
    x = torch.randn(5, IN).to(dtype)
    before = linear(x)
    others = [sparse()] if mixed and dtype == BF16 else []
    expected = x.double() @ weight.double().T
    ReferenceKernels().add_delta(widened(weights))(expected, x.double())
    for other in others:
        wide = SparseWeights(other.row_pointers, other.columns, other.values.double())
        ReferenceKernels().add_delta(wide)(expected, x.double())
    delta = linear.prepare([weights, *others])
    delta.fuse()
    near(linear(x), expected, dtype)
    delta.unfuse()
    assert torch.equal(linear(x), before)
