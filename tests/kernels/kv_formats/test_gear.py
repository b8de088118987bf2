"""gear, against its parts one by one in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_formats.format import KVFormat
from polydelta.kernels.kv_formats.gear import Gear
from polydelta.kernels.kv_formats.kivi import Kivi

Rows = Callable[..., tuple[Tensor, Tensor]]
PartsOf = Callable[[KVFormat, Tensor, Tensor], dict[str, Tensor]]


def outliers(row: Tensor) -> list[int]:
    """The largest channels and then the least, ties to the lower channel; both sorts are stable."""
    count, channels = -(-len(row) // 100), range(len(row))
    numbers = row.tolist()
    most = sorted(channels, key=lambda c: -numbers[c])[:count]
    return most + sorted(channels, key=lambda c: numbers[c])[:count]


def backbone(parts: dict[str, Tensor], side: str) -> Tensor:
    """Codes in their ranges, float64."""
    packed, axis = parts[f"{side}s"], 1 if side == "key" else 3
    codes = torch.stack([packed // 4**place % 4 for place in range(4)], -1).flatten(-2)
    scales = parts[f"{side}_scales"].double().repeat_interleave(32, axis)
    scale, zero = scales.narrow(axis, 0, codes.shape[axis]).unbind(-1)
    return codes * scale + zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_outliers_of_each_row_are_stored_as_they_are(
    dtype: torch.dtype, shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    keys, values = rows(shape, dtype=dtype)
    parts = parts_of(Gear(), keys, values)
    for side, given in (("key", keys), ("value", values)):
        places = parts[f"{side}_outlier_places"].flatten(0, -2).tolist()
        kept = parts[f"{side}_outliers"].flatten(0, -2)
        for row, mine, numbers in zip(given.flatten(0, -2), places, kept, strict=True):
            assert mine == outliers(row)
            assert numbers.tolist() == row[mine].tolist()


def test_outliers_are_read_as_they_are(
    shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    sides = rows(shape)
    got = Gear().decode(parts_of(Gear(), *sides))
    for given, mine in zip(sides, got, strict=True):
        for row, read in zip(given.flatten(0, -2), mine.flatten(0, -2), strict=True):
            places = outliers(row)
            assert read[places].tolist() == row[places].tolist()


def test_places_of_wide_heads_are_two_bytes(rows: Rows, parts_of: PartsOf) -> None:
    keys, values = rows((3, 1, 304))
    parts = parts_of(Gear(), keys, values)
    assert parts["key_outlier_places"].dtype == torch.int16
    assert parts["key_outlier_places"][0, 0, 0].tolist() == outliers(keys[0, 0, 0])
    assert torch.isfinite(Gear().decode(parts)[0]).all()


def test_ranges_are_those_of_what_is_no_outlier(
    shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    keys, values = rows(shape)
    parts = parts_of(Gear(), keys, values)
    for side, axis, given in (("key", 1, keys), ("value", 3, values)):
        places = parts[f"{side}_outlier_places"].long()
        outside = torch.zeros(given.shape, dtype=torch.bool).scatter_(-1, places, True)
        exact = given.double()
        for group in range(-(-given.shape[axis] // 32)):
            mine = (*[slice(None)] * axis, slice(32 * group, 32 * group + 32))
            numbers, out = exact[mine], outside[mine]
            least = numbers.masked_fill(out, torch.inf).amin(axis)
            most = numbers.masked_fill(out, -torch.inf).amax(axis)
            empty = out.all(axis)
            scale, zero = parts[f"{side}_scales"].double().select(axis, group).unbind(-1)
            assert torch.equal(zero, least.masked_fill(empty, 0.0).half().double())
            step = ((most - least) / 3).masked_fill(empty, 0.0)
            assert ((scale - step).abs() <= step * 2**-11 * 1.001 + 1e-7).all()


def test_what_is_read_is_the_sum_of_the_parts(
    shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    keys, values = rows(shape)
    parts = parts_of(Gear(), keys, values)
    for side, got in zip(("key", "value"), Gear().decode(parts), strict=True):
        expected = backbone(parts, side)
        left, right = parts[f"{side}_rows"].double(), parts[f"{side}_columns"].double()
        expected += torch.einsum("pthr,phrd->pthd", left, right)
        places = parts[f"{side}_outlier_places"].long()
        expected = expected.scatter(-1, places, parts[f"{side}_outliers"].double())
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(33, 3, 40), (49, 3, 64), (82, 2, 128)], ids=str)
def test_factors_take_off_most_of_what_two_of_them_can(
    size: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    keys, values = rows(size)
    parts = parts_of(Gear(), keys, values)
    for side, given in (("key", keys), ("value", values)):
        places = parts[f"{side}_outlier_places"].long()
        off = (given.double() - backbone(parts, side)).scatter(-1, places, 0.0).transpose(1, 2)
        left = parts[f"{side}_rows"].double().transpose(1, 2)
        rest = (off - left @ parts[f"{side}_columns"].double()).norm()
        assert rest < 0.98 * off.norm()
        assert rest <= 1.03 * torch.linalg.svdvals(off)[..., 2:].norm()


@pytest.mark.parametrize("size", [(33, 3, 40), (49, 3, 64), (70, 1, 128), (64, 5, 16)], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_nearer_than_its_backbone_alone(
    size: tuple[int, int, int], seed: int, rows: Rows, parts_of: PartsOf
) -> None:
    sides = rows(size, seed=seed)
    ours, theirs = (
        [
            (got - given.float()).norm()
            for got, given in zip(format.decode(parts_of(format, *sides)), sides, strict=True)
        ]
        for format in (Gear(), Kivi(2))
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine < 0.95 * other
