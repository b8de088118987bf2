"""What holds for every format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_formats.format import KVFormat, KVShape
from polydelta.kernels.kv_layout import page_layout

Rows = Callable[..., tuple[Tensor, Tensor]]
PartsOf = Callable[[KVFormat, Tensor, Tensor], dict[str, Tensor]]

# What they are off, of keys and of values as in `rows`, as a share of what these are: a third more
# than was measured.
OFF = {
    "native": (0.0, 0.0),
    "int8": (0.013, 0.009),
    "fp8": (0.033, 0.034),
    "int4": (0.125, 0.13),
    "kivi-4": (0.05, 0.105),
    "kivi-2": (0.25, 0.52),
    # Of 8 channels that are all the same, half and 5 are dropped.
    "mustafar-50": (0.12, 0.708),
    "mustafar-70": (0.2, 0.791),
    "gear": (0.18, 0.42),
}


def same_bytes(parts: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(
            part.contiguous().view(torch.uint8), others[name].contiguous().view(torch.uint8)
        )
        for name, part in parts.items()
    )


def test_formats_go_by_the_names_of_the_table() -> None:
    assert {name: make().name for name, make in FORMATS.items()} == {name: name for name in FORMATS}


def test_numbers_come_back_about_as_they_were(
    format: KVFormat, shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    sides = rows(shape)
    decoded = format.decode(parts_of(format, *sides))
    for given, got, most in zip(sides, decoded, OFF[format.name], strict=True):
        assert (got.dtype, got.shape) == (torch.float32, given.shape)
        assert (got - given.float()).norm() <= most * given.float().norm()


def test_a_page_is_the_same_whatever_is_encoded_beside_it(
    format: KVFormat, shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    keys, values = rows(shape, pages=7)
    together = parts_of(format, keys, values)
    for page in range(7):
        alone = parts_of(format, keys[page : page + 1], values[page : page + 1])
        assert same_bytes(alone, {name: part[page : page + 1] for name, part in together.items()})


def test_a_page_is_the_same_however_its_tokens_lie_in_memory(
    format: KVFormat, shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    keys, values = rows(shape)
    # As in the buffer of open pages, and with heads before tokens.
    beside = torch.stack((keys, values), 2)
    by_head = torch.stack((keys, values), 2).transpose(1, 3).contiguous().transpose(1, 3)
    for both in (beside, by_head):
        apart = parts_of(format, both[:, :, 0], both[:, :, 1])
        assert same_bytes(apart, parts_of(format, keys, values))


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if not name.startswith(("kivi", "gear", "mustafar"))]
)
def test_a_token_is_the_same_whatever_its_page_holds_beside_it(
    name: str, shape: tuple[int, int, int], rows: Rows, parts_of: PartsOf
) -> None:
    format = FORMATS[name]()
    keys, values = rows(shape)
    together = parts_of(format, keys, values)
    for token in {0, shape[0] // 2, shape[0] - 1}:
        one = slice(token, token + 1)
        alone = parts_of(format, keys[:, one], values[:, one])
        assert same_bytes(alone, {name: part[:, one] for name, part in together.items()})


# Native stores what it is given.
@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"native"}))
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_counts_as_zero_and_harms_no_other_token(
    name: str, rows: Rows, parts_of: PartsOf, wrong: float
) -> None:
    format = FORMATS[name]()
    sides = rows((37, 3, 40))
    zero = [side.clone() for side in sides]
    for bad, fine in zip(sides, zero, strict=True):
        bad[0, 5, 1, ::3] = wrong
        bad[1, -1] = wrong
        fine[0, 5, 1, ::3] = 0
        fine[1, -1] = 0
    parts = parts_of(format, *sides)
    assert same_bytes(parts, parts_of(format, *zero))
    decoded = format.decode(parts)
    for given, got, most in zip(zero, decoded, OFF[format.name], strict=True):
        assert got.isfinite().all()
        assert (got - given.float()).norm() <= most * given.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-7, 60000.0, 3e38])
def test_numbers_beyond_the_scales_stay_finite(
    format: KVFormat, rows: Rows, parts_of: PartsOf, dtype: torch.dtype, size: float
) -> None:
    most = min(size, torch.finfo(dtype).max)
    keys, values = (
        (side / side.abs().amax() * most).to(dtype)
        for side in rows((33, 2, 40), dtype=torch.float32)
    )
    for got in format.decode(parts_of(format, keys, values)):
        assert got.isfinite().all()
        assert got.abs().max() <= 4 * size


def test_nothing_but_zeros_comes_back_as_zeros(
    format: KVFormat, shape: tuple[int, int, int], parts_of: PartsOf
) -> None:
    nothing = torch.zeros(2, *shape)
    for got in format.decode(parts_of(format, nothing, nothing)):
        assert not got.any()


def test_pages_that_nobody_has_written_can_be_decoded_beside_others(
    format: KVFormat, rows: Rows, parts_of: PartsOf
) -> None:
    parts = parts_of(format, *rows((33, 3, 40)))
    alone = format.decode(parts)
    for byte in (0, 1, 200, 255):
        junk = {
            name: torch.full_like(part.contiguous().view(torch.uint8), byte).view(part.dtype)
            for name, part in parts.items()
        }
        beside = {name: torch.cat((junk[name], part)) for name, part in parts.items()}
        for got, expected in zip(format.decode(beside), alone, strict=True):
            assert torch.equal(got[2:], expected)


def test_pages_of_the_default_model_hold_as_many_more_tokens_as_they_should() -> None:
    # SmolLM2-135M's heads, and what 16 native tokens take.
    shape, page_bytes = KVShape(3, 64, torch.bfloat16), 12288
    tokens = {
        name: page_layout(page_bytes, partial(make().sections, shape=shape)).block_size
        for name, make in FORMATS.items()
    }
    assert tokens["native"] == 16
    assert min(tokens["int8"], tokens["fp8"]) >= 1.9 * 16
    assert tokens["int4"] >= 3.5 * 16
    assert tokens["mustafar-50"] >= 1.6 * 16
    assert tokens["mustafar-70"] >= 1.8 * 16
    assert min(tokens["kivi-4"], tokens["gear"]) >= 3 * 16
    assert tokens["kivi-2"] >= 5 * 16


# Of one token and head, where it counts: 40 channels, 33 tokens, 3 heads.
LAYOUTS = {
    "native": "keys bfloat16 [33, 3, 40], values bfloat16 [33, 3, 40]",
    "int8": "keys int8 [33, 3, 40], key_scales float16 [33, 3], "
    "values int8 [33, 3, 40], value_scales float16 [33, 3]",
    "fp8": "keys uint8 [33, 3, 40], key_scales float16 [33, 3], "
    "values uint8 [33, 3, 40], value_scales float16 [33, 3]",
    "int4": "keys uint8 [33, 3, 20], key_scales float16 [33, 3, 2], "
    "values uint8 [33, 3, 20], value_scales float16 [33, 3, 2]",
    "mustafar-50": "key_bits uint8 [33, 3, 5], keys bfloat16 [33, 3, 20], "
    "value_bits uint8 [33, 3, 5], values bfloat16 [33, 3, 20], "
    "key_means bfloat16 [3, 40]",
    "mustafar-70": "key_bits uint8 [33, 3, 5], keys bfloat16 [33, 3, 12], "
    "value_bits uint8 [33, 3, 5], values bfloat16 [33, 3, 12], "
    "key_means bfloat16 [3, 40]",
    "kivi-4": "keys uint8 [33, 3, 20], key_scales float16 [2, 3, 40, 2], "
    "values uint8 [33, 3, 20], value_scales float16 [33, 3, 2, 2]",
    "kivi-2": "keys uint8 [33, 3, 10], key_scales float16 [2, 3, 40, 2], "
    "values uint8 [33, 3, 10], value_scales float16 [33, 3, 2, 2]",
    "gear": "keys uint8 [33, 3, 10], key_scales float16 [2, 3, 40, 2], "
    "values uint8 [33, 3, 10], value_scales float16 [33, 3, 2, 2], "
    "key_outliers bfloat16 [33, 3, 2], key_outlier_places uint8 [33, 3, 2], "
    "key_rows float16 [33, 3, 2], key_columns float16 [3, 2, 40], "
    "value_outliers bfloat16 [33, 3, 2], value_outlier_places uint8 [33, 3, 2], "
    "value_rows float16 [33, 3, 2], value_columns float16 [3, 2, 40]",
}


def test_a_page_is_laid_out_as_faster_kernels_read_it(format: KVFormat) -> None:
    sections = format.sections(33, KVShape(3, 40, torch.bfloat16))
    written = ", ".join(
        f"{each.name} {str(each.dtype).removeprefix('torch.')} {list(each.shape)}"
        for each in sections
    )
    assert written == LAYOUTS[format.name]


@pytest.mark.parametrize(
    ("name", "head_dim", "why"),
    [
        ("int4", 33, "two channels in a byte: head_dim 33 is odd"),
        ("kivi-4", 33, "2 channels in a byte: head_dim 33 is not divisible by 2"),
        ("kivi-2", 34, "4 channels in a byte: head_dim 34 is not divisible by 4"),
        ("gear", 34, "4 channels in a byte: head_dim 34 is not divisible by 4"),
        ("mustafar-50", 36, "in whole bytes: head_dim 36 is not divisible by 8"),
        ("mustafar-70", 36, "in whole bytes: head_dim 36 is not divisible by 8"),
    ],
)
def test_heads_that_a_format_cannot_store_are_refused(name: str, head_dim: int, why: str) -> None:
    with pytest.raises(ValueError, match=f"KV format {name} stores .*{why}"):
        FORMATS[name]().sections(16, KVShape(3, head_dim, torch.bfloat16))
