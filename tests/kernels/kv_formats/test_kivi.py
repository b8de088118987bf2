"""kivi, against a group by group computation in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_formats.format import KVFormat
from polydelta.kernels.kv_formats.kivi import Kivi

Rows = Callable[..., tuple[Tensor, Tensor]]
PartsOf = Callable[[KVFormat, Tensor, Tensor], dict[str, Tensor]]


def codes_of(packed: Tensor, bits: int) -> Tensor:
    inside = [packed // 2**shift % 2**bits for shift in range(0, 8, bits)]
    return torch.stack(inside, -1).flatten(-2)


def check_groups(
    given: Tensor, packed: Tensor, scales: Tensor, got: Tensor, axis: int, bits: int
) -> None:
    """Numbers of each group of 32 of the axis, the last one shorter, are in equal steps from the
    least to the most. scales: `[..., groups, ..., 2]`."""
    highest, codes = 2**bits - 1, codes_of(packed, bits)
    assert scales.shape[axis] == -(-given.shape[axis] // 32)
    for group in range(scales.shape[axis]):
        part = slice(32 * group, min(32 * group + 32, given.shape[axis]))
        mine = (*[slice(None)] * axis, part)
        exact = given.double()[mine]
        least, most = exact.amin(axis, keepdim=True), exact.amax(axis, keepdim=True)
        scale, zero = (
            each.double().unsqueeze(axis) for each in scales.select(axis, group).unbind(-1)
        )
        step = (most - least) / highest
        assert ((scale - step).abs() <= step * 2**-11 * 1.001 + 1e-7).all()
        assert torch.equal(zero, least.half().double())
        wanted = ((exact - zero) / scale).nan_to_num(0.0, 0.0, 0.0).clamp(0, highest)
        assert ((codes[mine] - wanted).abs() <= 0.5 + 1e-4).all()
        back = got.double()[mine]
        assert torch.allclose(back, codes[mine] * scale + zero, rtol=1e-6, atol=1e-6)
        # Half a step, and what the rounding of scale and zero leaves the most above its code.
        above = (highest * step + least.abs()) * 2**-11
        assert ((back - exact).abs() <= scale / 2 + above + 1e-5).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_keys_share_ranges_by_channel_and_values_by_token(
    bits: int, dtype: torch.dtype, shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    keys, values = rows(shape, dtype=dtype)
    parts = parts_of(Kivi(bits), keys, values)
    got_keys, got_values = Kivi(bits).decode(parts)
    check_groups(keys, parts["keys"], parts["key_scales"], got_keys, 1, bits)
    check_groups(values, parts["values"], parts["value_scales"], got_values, 3, bits)


def test_groups_of_keys_begin_with_the_page_and_do_not_see_each_other(rows: Rows) -> None:
    keys, values = rows((70, 2, 16))
    whole = Kivi(2).encode(keys, values)["key_scales"]
    for group in range(3):
        part = slice(32 * group, 32 * group + 32)
        alone = Kivi(2).encode(keys[:, part], values[:, part])["key_scales"]
        assert torch.equal(alone[:, 0], whole[:, group])


def test_a_channel_that_does_not_change_is_exact() -> None:
    keys = torch.arange(8.0).expand(1, 40, 3, 8)
    values = torch.arange(40.0)[:, None, None].expand(1, 40, 3, 8)
    got_keys, got_values = Kivi(2).decode(Kivi(2).encode(keys, values))
    assert torch.equal(got_keys, keys)
    assert torch.equal(got_values, values)
