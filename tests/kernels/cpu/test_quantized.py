"""Products with weights of 4 and 8 bits: bit for bit those with the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.choice import cpu_kernels
from polydelta.kernels.quantized_weight import quantize

KERNELS = cpu_kernels(torch.bfloat16)
pytestmark = pytest.mark.skipif(
    not isinstance(KERNELS, Bfloat16Kernels), reason="needs a C compiler and AVX512-BF16"
)

BITS = pytest.mark.parametrize("bits", [4, 8])
# Whole groups or not, and more of them than the buffer holds; whole panels or not.
SHAPES = pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 2), (33, 30), (64, 64), (95, 96), (31, 34), (100, 320), (130, 546)]
)
# In registers, in one tile, in several, and in several blocks of rows.
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 50, 193, 400]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@BITS
@SHAPES
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_near_those_in_float64(
    near: Callable[[Tensor, Tensor, torch.dtype], None],
    bits: int,
    outputs: int,
    inputs: int,
    biased: bool,
) -> None:
    weight = quantize(torch.randn(outputs, inputs) * torch.rand(outputs, 1), bits)
    bias = torch.randn(outputs).bfloat16() if biased else None
    linear = KERNELS.quantized_linear(weight, bias)
    values = weight.dequantized().bfloat16().double()
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        expected = x.double() @ values.t() + (0 if bias is None else bias.double())
        near(linear(x), expected, torch.bfloat16)


@BITS
@SHAPES
def test_products_have_the_bits_of_those_in_bfloat16(bits: int, outputs: int, inputs: int) -> None:
    weight = quantize(torch.randn(outputs, inputs) * torch.rand(outputs, 1), bits)
    values, bias = weight.dequantized().bfloat16(), torch.randn(outputs).bfloat16()
    linear, expected = KERNELS.quantized_linear(weight, bias), KERNELS.linear(values, bias)
    head, expected_head = KERNELS.quantized_head(weight), KERNELS.head(values)
    for rows in ROWS:
        x = torch.randn(rows, inputs + 6).bfloat16()[:, 4 : 4 + inputs]  # rows are not adjacent
        assert torch.equal(linear(x), expected(x))
        assert torch.equal(head(x), expected_head(x))
        assert head(x).dtype == torch.float32


@BITS
@SHAPES
def test_the_bits_of_a_row_do_not_depend_on_the_batch(bits: int, outputs: int, inputs: int) -> None:
    linear = KERNELS.quantized_linear(quantize(torch.randn(outputs, inputs), bits), None)
    x = torch.randn(400, inputs).bfloat16()
    everything = linear(x)
    for rows in ROWS:
        assert torch.equal(linear(x[:rows]), everything[:rows])


@BITS
def test_codes_at_the_ends_of_their_range_count(bits: int) -> None:
    """Files may have -128, which our own rounding never gives."""
    weight = quantize(torch.randn(40, 64), bits)
    weight.codes[::2] = 15 if bits == 4 else -128
    weight.codes[1::3] = 0 if bits == 4 else 127
    x = torch.randn(3, 64).bfloat16()
    expected = KERNELS.linear(weight.dequantized().bfloat16(), None)(x)
    assert torch.equal(KERNELS.quantized_linear(weight, None)(x), expected)


@BITS
def test_an_odd_number_of_columns_is_computed_by_torch(
    near: Callable[[Tensor, Tensor, torch.dtype], None], bits: int
) -> None:
    weight, x = quantize(torch.randn(9, 33), bits), torch.randn(4, 33).bfloat16()
    expected = x.double() @ weight.dequantized().double().t()
    near(KERNELS.quantized_linear(weight, None)(x), expected, torch.bfloat16)
    near(KERNELS.quantized_head(weight)(x), expected, torch.bfloat16)
