"""int4, against what its numbers are by definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polydelta.kernels.kv_formats.format import KVFormat
from polydelta.kernels.kv_formats.int4 import Int4

Rows = Callable[..., tuple[Tensor, Tensor]]
PartsOf = Callable[[KVFormat, Tensor, Tensor], dict[str, Tensor]]


def test_codes_are_the_nearest_of_16_between_the_least_and_the_most(
    shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf, nearest: Callable[..., None]
) -> None:
    keys, values = rows(shape)
    parts = parts_of(Int4(), keys, values)
    decoded = Int4().decode(parts)
    for side, given, got in zip(("key", "value"), (keys, values), decoded, strict=True):
        exact, packed = given.double(), parts[f"{side}s"]
        scale, zero = parts[f"{side}_scales"].double()[..., None].unbind(-2)
        step = (exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)) / 15
        assert ((scale - step).abs() <= step * 2**-11 * 1.0001).all()
        assert torch.equal(zero, exact.amin(-1, keepdim=True).half().double())
        # Even channels in the low half of a byte.
        codes = torch.stack((packed % 16, packed // 16), -1).flatten(-2)
        nearest(codes, ((exact - zero) / scale).nan_to_num(0.0), 15)
        assert torch.allclose(got.double(), codes * scale + zero, rtol=1e-6, atol=1e-6)
        # Half a step, and what the rounding of scale and zero leaves the most above its code.
        above = 15 * step * 2**-11 + exact.amin(-1, keepdim=True).abs() * 2**-11
        assert ((got.double() - exact).abs() <= scale / 2 + above + 1e-6).all()


def test_ties_go_to_the_even_code() -> None:
    row = torch.tensor([-4.0, 11.0, -3.5, -2.5, -1.5, 10.5]).expand(1, 1, 1, -1)
    parts = Int4().encode(row, row)
    assert parts["key_scales"].flatten().tolist() == [1.0, -4.0]
    # Codes 0, 15, 0, 2, 2, 14, the first of a pair in the low half.
    assert parts["keys"].flatten().tolist() == [0xF0, 0x20, 0xE2]


def test_a_constant_row_is_its_zero() -> None:
    row = torch.full((1, 1, 1, 6), -2.75)
    parts = Int4().encode(row, row)
    assert parts["key_scales"].flatten().tolist() == [0.0, -2.75]
    assert not parts["keys"].any()
    assert torch.equal(Int4().decode(parts)[0], row)
