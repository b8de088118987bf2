"""int8 and fp8, against what their numbers are by definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_formats.format import KVFormat
from polydelta.kernels.kv_formats.scaled import Fp8, Int8

Rows = Callable[..., tuple[Tensor, Tensor]]
PartsOf = Callable[[KVFormat, Tensor, Tensor], dict[str, Tensor]]


def e4m3(byte: int) -> float:
    """The number of a byte: a sign, 4 bits of exponent, 3 of fraction."""
    sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    size = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction / 8 * 2.0**-6
    return -size if sign else size


NUMBERS = torch.tensor([e4m3(byte) for byte in range(256)], dtype=torch.float64)


@pytest.mark.parametrize(("format", "largest"), [(Int8(), 127), (Fp8(), 448)], ids=["int8", "fp8"])
def test_the_largest_magnitude_of_a_row_is_the_largest_code(
    format: KVFormat, largest: int, shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    keys, values = rows(shape, dtype=torch.float32)
    parts = parts_of(format, keys, values)
    for side, given in (("key", keys), ("value", values)):
        exact = given.double().abs().amax(-1) / largest
        scales = parts[f"{side}_scales"].double()
        assert ((scales - exact).abs() <= exact * 2**-11 * 1.0001).all()


def test_codes_of_int8_are_the_nearest(
    shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf, nearest: Callable[..., None]
) -> None:
    keys, values = rows(shape)
    parts = parts_of(Int8(), keys, values)
    decoded = Int8().decode(parts)
    for side, given, got in zip(("key", "value"), (keys, values), decoded, strict=True):
        scales, codes = parts[f"{side}_scales"].double()[..., None], parts[f"{side}s"]
        nearest(codes, (given.double() / scales).nan_to_num(0.0), 127, -127)
        assert torch.equal(got.double(), codes.double() * scales)
        # Half a step, and what the scale's own rounding leaves the largest number above its code.
        assert ((got.double() - given.double()).abs() <= scales * (0.5 + 127 * 2**-11)).all()


def test_codes_of_fp8_are_the_nearest(
    shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    keys, values = rows(shape)
    parts = parts_of(Fp8(), keys, values)
    decoded = Fp8().decode(parts)
    for side, given, got in zip(("key", "value"), (keys, values), decoded, strict=True):
        scales = parts[f"{side}_scales"].double()[..., None]
        numbers = NUMBERS[parts[f"{side}s"].long()]
        exact = (given.double() / scales).nan_to_num(0.0).clamp(-448, 448)
        closest = (exact[..., None] - NUMBERS[NUMBERS.isfinite()]).abs().amin(-1)
        assert ((numbers - exact).abs() <= closest + exact.abs() * 1e-6).all()
        assert torch.equal(got.double(), (numbers * scales).float().double())


def test_ties_go_to_the_even_code() -> None:
    row = torch.tensor([127.0, 0.5, 1.5, -2.5, -127.0, 3.4999]).expand(1, 1, 1, -1)
    assert Int8().encode(row, row)["keys"].flatten().tolist() == [127, 0, 2, -2, -127, 3]
    # The fraction's steps: 8 between 64 and 128, 32 from 256 on.
    row = torch.tensor([448.0, 68.0, 76.0, -272.0, 304.0, 17.0]).expand(1, 1, 1, -1)
    codes = Fp8().encode(row, row)["keys"].flatten()
    assert NUMBERS[codes.long()].tolist() == [448, 64, 80, -256, 320, 16]


def test_rows_too_small_for_a_scale_are_zeros() -> None:
    row = torch.full((1, 1, 1, 8), 1e-7)
    for format in (Int8(), Fp8()):
        parts = format.encode(row, row)
        assert not parts["key_scales"].any()
        assert not parts["keys"].any()
