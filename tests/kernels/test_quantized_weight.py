"""Weights of 4 and 8 bits: how near they are to what they were made of."""

from __future__ import annotations

import pytest
import torch

from polydelta.kernels.quantized_weight import GROUP, QuantizedWeight, quantize, stack
from polydelta.kernels.reference import ReferenceKernels

BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 32), (7, 33), (33, 576)])
def test_no_weight_of_8_bits_is_off_by_more_than_half_a_step(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    quantized = quantize(weight, 8)
    assert (quantized.bits, quantized.shape) == (8, shape)
    steps = quantized.scales.float().repeat_interleave(GROUP, 1)[:, : shape[1]]
    # The largest number of a group bears the rounding of its scale to float16.
    error = (quantized.dequantized() - weight).abs()
    assert (error <= 0.5 * steps * (1 + 127 * 2.0**-10) + 1e-7).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 32), (7, 33), (33, 576)])
def test_weights_of_4_bits_are_nearer_than_those_of_the_plain_range(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    quantized = quantize(weight, 4)
    assert (quantized.bits, quantized.shape) == (4, shape)
    for columns in range(0, shape[1], GROUP):
        part = weight[:, columns : columns + GROUP]
        got = quantized.dequantized()[:, columns : columns + GROUP]
        low, high = part.aminmax(dim=1, keepdim=True)
        steps = ((high - low) / 15).clamp(min=1e-9)
        plain = low + ((part - low) / steps).round() * steps
        off, plain_off = (got - part).norm(dim=1), (plain - part).norm(dim=1)
        assert (off <= plain_off + 1e-3 * part.abs().amax(1)).all()


@BITS
def test_numbers_on_the_grid_come_back_as_they_were(bits: int) -> None:
    torch.manual_seed(0)
    codes = (
        torch.randint(0, 16, (5, 3, GROUP))
        if bits == 4
        else torch.randint(-127, 128, (5, 3, GROUP))
    )
    codes[..., 0], codes[..., 1] = (0, 15) if bits == 4 else (-127, 127)
    weight = (codes * 0.125 - (1.5 if bits == 4 else 0)).flatten(1)
    assert torch.equal(quantize(weight, bits).dequantized(), weight)


@BITS
@pytest.mark.parametrize("value", [0.0, 0.75, -3.0])
def test_a_group_of_one_number_is_exact_where_float16_is(bits: int, value: float) -> None:
    got = quantize(torch.full((2, 40), value), bits).dequantized()
    assert torch.allclose(got, torch.full((2, 40), value), rtol=0 if bits == 4 else 1e-3, atol=0)


@BITS
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e5])
def test_numbers_that_scales_cannot_hold_are_refused(bits: int, value: float) -> None:
    weight = torch.ones(3, 40)
    weight[1, 35] = value
    with pytest.raises(ValueError, match="not finite, or beyond 32768"):
        quantize(weight, bits)


def test_a_stack_has_the_rows_of_its_parts_and_the_bits_of_the_widest() -> None:
    torch.manual_seed(0)
    narrow, wide = quantize(torch.randn(3, 40), 4), quantize(torch.randn(2, 40), 8)
    assert torch.equal(stack([narrow, narrow]).dequantized(), narrow.dequantized().repeat(2, 1))
    mixed = stack([narrow, wide])
    assert mixed.bits == 8
    assert torch.equal(mixed.dequantized()[3:], wide.dequantized())
    assert (mixed.dequantized()[:3] - narrow.dequantized()).abs().max() < 0.02


@BITS
def test_rows_can_be_put_into_another_order(bits: int) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(5, 70), bits)
    flipped: QuantizedWeight = weight.map_rows(lambda rows: rows.flip(0))
    assert torch.equal(flipped.dequantized(), weight.dequantized().flip(0))


@BITS
def test_the_reference_multiplies_with_the_dequantised_weight(bits: int) -> None:
    torch.manual_seed(0)
    kernels, x, bias = ReferenceKernels(), torch.randn(3, 50), torch.randn(7)
    weight = quantize(torch.randn(7, 50), bits)
    expected = x @ weight.dequantized().t()
    torch.testing.assert_close(kernels.quantized_linear(weight, bias)(x), expected + bias)
    torch.testing.assert_close(kernels.quantized_head(weight)(x), expected)
