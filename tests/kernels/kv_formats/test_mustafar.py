"""mustafar, against a row by row choice of the largest channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_formats.format import KVFormat
from polydelta.kernels.kv_formats.mustafar import Mustafar

Rows = Callable[..., tuple[Tensor, Tensor]]
PartsOf = Callable[[KVFormat, Tensor, Tensor], dict[str, Tensor]]


def pruned(rows: Tensor, kept: int) -> Tensor:
    """The largest channels of each row, ties to the lower one, and 0 for the others."""
    result = torch.zeros_like(rows)
    for row, out in zip(rows.flatten(0, -2), result.flatten(0, -2), strict=True):
        sizes = row.abs().tolist()
        for channel in sorted(range(len(sizes)), key=lambda c: (-sizes[c], c))[:kept]:
            out[channel] = row[channel]
    return result


@pytest.mark.parametrize(("sparsity", "dropped"), [(0.5, 50), (0.7, 70)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_largest_channels_stay_as_they_are(
    sparsity: float,
    dropped: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    rows: Rows,
    parts_of: PartsOf,
) -> None:
    format, kept = Mustafar(sparsity), shape[2] - dropped * shape[2] // 100
    sides = rows(shape, dtype=dtype)
    parts = parts_of(format, *sides)
    assert parts["keys"].shape[-1] == parts["values"].shape[-1] == kept
    for given, got in zip(sides, format.decode(parts), strict=True):
        assert torch.equal(got, pruned(given, kept).float())


def test_ties_stay_at_the_lower_channels() -> None:
    row = torch.tensor([1.0, -2.0, 2.0, 1.0, -1.0, 1.0, 2.0, 0.0]).expand(1, 1, 1, -1)
    parts = Mustafar(0.5).encode(row, row)
    # Channels 0, 1, 2 and 6, channel 0 in the lowest bit.
    assert parts["key_bits"].flatten().tolist() == [0b01000111]
    assert parts["keys"].flatten().tolist() == [1.0, -2.0, 2.0, 2.0]
    constant = torch.full((1, 1, 1, 16), -3.0)
    assert Mustafar(0.7).encode(constant, constant)["key_bits"].flatten().tolist() == [31, 0]


def test_every_row_keeps_as_many(rows: Rows, parts_of: PartsOf) -> None:
    parts = parts_of(Mustafar(0.7), *rows((9, 3, 64)))
    bits = parts["key_bits"][..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    assert (bits.sum((-1, -2)) == 20).all()
