"""Low-rank matrices of 8 or 4 bits, in the reference and in a layer's weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store import row_codes
from polydelta.adapters_store.row_codes import quantize_rows
from polydelta.kernels.delta_weights import (
    GROUP,
    LowRankBlock,
    LowRankWeights,
    Matrix,
    QuantizedMatrix,
    dense,
)
from polydelta.kernels.fusing import with_deltas
from polydelta.kernels.reference import ReferenceKernels

BITS = pytest.mark.parametrize("bits", [8, 4])
IN, OUT = 45, 70


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def quantized(rows: int, columns: int, bits: int) -> QuantizedMatrix:
    return QuantizedMatrix(*quantize_rows(torch.randn(rows, columns), bits), columns)


def low_rank(bits: int) -> LowRankWeights:
    """Two parts, and outputs that are nobody's."""
    blocks = (
        LowRankBlock(2, 0, quantized(3, 20, bits)),
        LowRankBlock(30, 3, quantized(5, 33, bits)),
    )
    return LowRankWeights(quantized(8, IN, bits), blocks)


def plain(weights: LowRankWeights, dtype: torch.dtype) -> LowRankWeights:
    """The same numbers, written out."""

    def written(matrix: Matrix) -> Tensor:
        return dense(matrix, dtype)

    blocks = tuple(LowRankBlock(b.out_start, b.rank_start, written(b.b_t)) for b in weights.blocks)
    return LowRankWeights(written(weights.a), blocks)


def test_the_store_and_the_kernels_mean_the_same_groups() -> None:
    assert row_codes.GROUP == GROUP


def test_codes_of_8_bits_are_numbers_times_their_groups_scale() -> None:
    codes = torch.arange(-66, 4).to(torch.int8).view(2, 35)
    scales = torch.tensor([[0.5, -2.0], [4.0, 0.25]]).half()
    matrix = QuantizedMatrix(codes, scales, 35)
    assert (matrix.bits, matrix.shape) == (8, (2, 35))
    values = matrix.dequantized(torch.float32)
    assert torch.equal(values[:, :32], codes[:, :32].float() * torch.tensor([[0.5], [4.0]]))
    assert torch.equal(values[:, 32:], codes[:, 32:].float() * torch.tensor([[-2.0], [0.25]]))


def test_codes_of_4_bits_lie_two_in_a_byte_the_even_column_below() -> None:
    codes = torch.tensor([[0xF0, 0x98, 0x07]], dtype=torch.uint8)
    matrix = QuantizedMatrix(codes, torch.tensor([[0.5]]).half(), 5)
    assert (matrix.bits, matrix.shape) == (4, (1, 5))
    assert matrix.dequantized(torch.float32).tolist() == [[-4.0, 3.5, 0.0, 0.5, -0.5]]


@BITS
def test_numbers_are_rounded_to_a_dtype_once(bits: int) -> None:
    matrix = quantized(7, 77, bits)
    expected = matrix.dequantized(torch.float64).to(torch.bfloat16)
    assert torch.equal(matrix.dequantized(torch.bfloat16), expected)
    assert dense(matrix, torch.bfloat16).dtype == torch.bfloat16


@BITS
def test_a_product_is_that_of_the_numbers_written_out(bits: int) -> None:
    weights = low_rank(bits)
    y, x = torch.randn(6, OUT), torch.randn(6, IN)
    expected = y.clone()
    ReferenceKernels().add_delta(weights)(y, x)
    ReferenceKernels().add_delta(plain(weights, torch.float32))(expected, x)
    assert torch.equal(y, expected)


@BITS
def test_a_layer_takes_them_into_its_weight_as_it_takes_the_numbers(bits: int) -> None:
    weights, weight = low_rank(bits), torch.randn(OUT, IN)
    expected = with_deltas(weight, [plain(weights, torch.float32)])
    assert torch.equal(with_deltas(weight, [weights]), expected)
    assert not torch.equal(expected, weight)
