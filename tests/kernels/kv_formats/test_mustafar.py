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
    keys, values = rows(shape, dtype=dtype)
    parts = parts_of(format, keys, values)
    assert parts["keys"].shape[-1] == parts["values"].shape[-1] == kept
    got_keys, got_values = format.decode(parts)
    assert torch.equal(got_values, pruned(values, kept).float())
    # Of keys, what is left of them beside the page's mean.
    means = parts["key_means"].float()[:, None]
    rest = (keys.float() - means).to(dtype)
    assert torch.equal(got_keys, means + pruned(rest, kept).float())


def test_the_mean_of_keys_is_that_of_their_page(rows: Rows, parts_of: PartsOf) -> None:
    keys, values = rows((7, 3, 16))
    means = parts_of(Mustafar(0.5), keys, values)["key_means"]
    expected = keys.double().mean(1)
    # A bfloat16 number's half step.
    assert ((means.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-30).all()


def test_what_all_keys_of_a_page_have_in_common_is_not_lost(parts_of: PartsOf) -> None:
    """Where a row's largest channels are large in all of them, the others tell tokens apart."""
    chance = torch.Generator().manual_seed(3)
    own = torch.randn(1, 9, 1, 16, generator=chance).mul(0.1)
    own[..., :8] = 0
    common = torch.arange(16.0).where(torch.arange(16) < 8, 0.0) * 8
    keys = common + own
    got, _ = Mustafar(0.5).decode(parts_of(Mustafar(0.5), keys, keys))
    assert float((got - keys).abs().max()) < 1e-5


def test_numbers_that_are_not_finite_stay_out_of_the_mean(parts_of: PartsOf) -> None:
    keys = torch.ones(1, 4, 2, 8)
    keys[0, 1, 0, 3], keys[0, 2, 1, 5] = torch.inf, torch.nan
    means = parts_of(Mustafar(0.5), keys, keys)["key_means"]
    expected = torch.ones(1, 2, 8)
    expected[0, 0, 3] = expected[0, 1, 5] = 0.75
    assert torch.equal(means, expected)


def test_ties_stay_at_the_lower_channels() -> None:
    row = torch.tensor([1.0, -2.0, 2.0, 1.0, -1.0, 1.0, 2.0, 0.0]).expand(1, 1, 1, -1)
    parts = Mustafar(0.5).encode(row, row)
    # Channels 0, 1, 2 and 6, channel 0 in the lowest bit.
    assert parts["value_bits"].flatten().tolist() == [0b01000111]
    assert parts["values"].flatten().tolist() == [1.0, -2.0, 2.0, 2.0]
    # A key that is its page's mean has nothing else.
    assert parts["key_bits"].flatten().tolist() == [0b00001111]
    assert parts["keys"].flatten().tolist() == [0.0] * 4
    constant = torch.full((1, 1, 1, 16), -3.0)
    assert Mustafar(0.7).encode(constant, constant)["value_bits"].flatten().tolist() == [31, 0]


def test_every_row_keeps_as_many(rows: Rows, parts_of: PartsOf) -> None:
    parts = parts_of(Mustafar(0.7), *rows((9, 3, 64)))
    bits = parts["key_bits"][..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    assert (bits.sum((-1, -2)) == 20).all()
