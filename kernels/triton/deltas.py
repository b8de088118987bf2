"""The deltas of all adapters of a step at one site, of any kinds and ranks, in one launch.

A program owns some rows, all of one segment, and a span of columns of y. It goes through the
adapters that act on the rows, and through their records in order, and reads weights where they lie
in the pool. Nobody else writes what it owns: there are no atomics, and a row's result does not
depend on other segments. What low-rank deltas shrink x to is computed once more for each span of
columns: A comes from the cache then, and a site costs one launch instead of two.

The words of a step, int32:

    slot 0 | slot 1 | ... | further entries

    slot:  first row, rows, entries, where the second entry is; the first entry
    entry: address of the adapter's table (2), its weight, words of a site, where its page ids are
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.triton.adapter_table import MOST_RANKS
from polydelta.kernels.triton.delta_pages import GROUP_BYTES, Source, Span
from polydelta.kernels.triton.delta_records import (
    NOTHING,
    RECORD_WORDS,
    ROWS_OF_Y,
    low_rank_row,
    low_rank_tile,
    other_row,
    other_tile,
)
from polydelta.kernels.triton.shipping import Floor, ShippedKernel
from polydelta.kernels.triton.tuning import Options, Tunable

SLOT_HEAD = 4
ENTRY_WORDS = 5
SLOT_WORDS = SLOT_HEAD + ENTRY_WORDS
# Rows of a slot: one, or up to so many in a step of few and in one of many.
FEW_ROWS, MANY_ROWS = 16, 64
# Programs that a launch should have: one for each of 132 multiprocessors, whose registers hold no
# more. One more would be a second wave, and each reads A again.
PROGRAMS = 132
# Columns of a span are a multiple of a power of two between these: so few spans have columns of two
# parts of a fused layer, whose inputs are shrunk twice.
SPAN, WIDE_SPAN = 64, 1024


@dataclass(frozen=True, eq=False)
class Pool:
    """The pool, `[layers, pages, page_bytes]`, in every dtype that kernels read there."""

    numbers: Tensor
    codes: Tensor
    halves: Tensor
    ints: Tensor
    floats: Tensor

    @staticmethod
    def of(storage: Tensor, dtype: torch.dtype) -> Pool:
        """storage: uint8; dtype: of adapters' numbers."""
        views = (storage.view(d) for d in (torch.float16, torch.int32, torch.float32))
        return Pool(storage.view(dtype), storage, *views)

    @property
    def page_groups(self) -> int:
        """Groups of 64 bytes in a page."""
        return self.codes.shape[2] // GROUP_BYTES

    def is_like(self, other: Pool) -> bool:
        """Whether one launch can read adapters of both."""
        mine, theirs = self.numbers, other.numbers
        same_place = mine.data_ptr() == theirs.data_ptr() and mine.shape == theirs.shape
        return same_place and mine.dtype == theirs.dtype


def apply_deltas(
    y: Tensor, x: Tensor, columns: Tensor, pool: Pool, steps: Tensor, slots: int, rows: int,
    site: int,
) -> None:  # fmt: skip
    """y `[tokens, out]` changed in place, x `[tokens, in]`, both dense in the last axis and of the
    pool's dtype; columns: x in any order of memory, dense by columns where it pays.

    steps: as above; slots: how many of them there are; rows: of a slot at most, FEW_ROWS or
    MANY_ROWS. Which programs are launched depends on nothing in `steps`.
    """
    in_features, out_features = x.shape[1], y.shape[1]
    options = choices(rows).options()
    wide = -(-out_features // max(1, options["programs"] // slots))
    step = min(WIDE_SPAN, max(SPAN, triton.next_power_of_2(wide)))
    span_columns = -(-wide // step) * step
    grid = (-(-out_features // span_columns), slots)
    scratch = torch.empty(grid[0] * slots * rows * MOST_RANKS, dtype=torch.float32, device=y.device)
    deltas_kernel[grid](
        y, x, columns, pool.numbers, pool.codes, pool.halves, pool.ints, pool.floats, steps,
        scratch, y.stride(0), x.stride(0), columns.stride(0), columns.stride(1),
        in_features, out_features, span_columns, site,
        **_constants(pool.page_groups, rows), **_compiled_with(options),
    )  # fmt: skip


@cache
def choices(rows: int) -> Tunable:
    """What is worth a try for launches with slots of so many rows."""
    options = {"num_warps": 8, "num_stages": 2}
    programs = (PROGRAMS, 96, 192, 264)
    return Tunable(
        f"adapters, slots of {rows} rows", tuple({**options, "programs": p} for p in programs)
    )


def _compiled_with(options: Options) -> dict[str, int]:
    return {name: options[name] for name in ("num_warps", "num_stages")}


def _constants(page_groups: int, rows: int) -> dict[str, int]:
    """Blocks are counted in groups of 64 bytes. Of one row, all that the registers hold is loaded
    at once: each turn of the loop over A waits for a look-up and for the weights."""
    wide = 64 if rows == FEW_ROWS else 32
    sizes = {"PAGE_GROUPS": page_groups, "ROWS": rows, "RANKS": MOST_RANKS}
    words = {"SLOT_HEAD": SLOT_HEAD, "ENTRY_WORDS": ENTRY_WORDS}
    return sizes | words | {"BLOCK_IN": wide, "BLOCK_OUT": wide, "TILE_IN": 4, "TILE_OUT": 2}


@triton.jit(do_not_specialize=["site", "columns_column_stride"])
def deltas_kernel(
    y_ptr,
    x_ptr,
    columns_ptr,
    numbers_ptr,
    codes_ptr,
    halves_ptr,
    ints_ptr,
    floats_ptr,
    steps_ptr,
    scratch_ptr,
    y_stride,
    x_stride,
    columns_row_stride,
    columns_column_stride,
    in_features,
    out_features,
    span_columns,
    site,
    PAGE_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    SLOT_HEAD: tl.constexpr,
    ENTRY_WORDS: tl.constexpr,
):
    """y `[tokens, out]` changed in place, x `[tokens, in]`; columns: x once more, with any strides.

    numbers, codes, halves, ints, floats: the pool in several dtypes; scratch: for each program
    `[ROWS, RANKS]` float32. Grid: spans of columns, slots.
    """
    first_column = tl.program_id(0) * span_columns
    span = Span(first_column, tl.minimum(first_column + span_columns, out_features))
    slot = tl.program_id(1) * (SLOT_HEAD + ENTRY_WORDS)
    row = tl.load(steps_ptr + slot).to(tl.int64)
    rows = tl.load(steps_ptr + slot + 1)
    entries = tl.load(steps_ptr + slot + 2)
    further = tl.load(steps_ptr + slot + 3)
    y = y_ptr + row * y_stride
    x = x_ptr + row * x_stride
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    scratch = scratch_ptr + program.to(tl.int64) * (ROWS * RANKS)
    for number in range(0, entries):
        at = tl.where(number == 0, slot + SLOT_HEAD, further + (number - 1) * ENTRY_WORDS)
        low = tl.load(steps_ptr + at).to(tl.int64) & 0xFFFFFFFF
        high = tl.load(steps_ptr + at + 1).to(tl.int64)
        weight = tl.load(steps_ptr + at + 2).to(tl.float32, bitcast=True)
        site_words = tl.load(steps_ptr + at + 3)
        pages = tl.load(steps_ptr + at + 4)
        table = (high << 32 | low).to(tl.pointer_type(tl.int32))
        for place in range(0, site_words, RECORD_WORDS):
            record = table + site * site_words + place
            kind = tl.load(record)
            source = Source(
                numbers_ptr, codes_ptr, halves_ptr, ints_ptr, floats_ptr,
                table + pages, tl.load(record + 1),
            )  # fmt: skip
            first, count = tl.load(record + 2), tl.load(record + 3)
            if (kind != NOTHING) & (first < span.stop) & (span.start - first < count):
                if rows == 1:
                    if kind <= ROWS_OF_Y:
                        low_rank_row(
                            y, x, scratch, source, record, kind, in_features, weight, span,
                            PAGE_GROUPS, RANKS, BLOCK_IN, BLOCK_OUT,
                        )  # fmt: skip
                    else:
                        other_row(
                            y, x, source, record, kind, in_features, weight, span, PAGE_GROUPS
                        )
                elif kind <= ROWS_OF_Y:
                    low_rank_tile(
                        y, y_stride, x, x_stride, rows, scratch, source, record, kind,
                        in_features, weight, span, PAGE_GROUPS, ROWS, RANKS, TILE_IN, TILE_OUT,
                    )  # fmt: skip
                else:
                    columns = (
                        columns_ptr + tl.load(steps_ptr + slot).to(tl.int64) * columns_row_stride
                    )
                    other_tile(
                        y, y_stride, x, x_stride, columns, columns_row_stride,
                        columns_column_stride, rows, source, record, kind, in_features, weight,
                        span, PAGE_GROUPS, ROWS,
                    )  # fmt: skip
                # The next one may give y's columns to other threads, and scratch to others.
                tl.debug_barrier()


def shipped() -> list[ShippedKernel]:
    """For q, k and v of Llama-3-8B, over pages of 64 KiB."""
    hidden, out, parts, rank = 4096, 6144, 3, 16
    each = 2 * rank * (parts * hidden + out)
    floors = {
        FEW_ROWS: Floor("64 rows of 64 adapters, rank 16, 4096 -> 6144", 64 * each),
        MANY_ROWS: Floor(
            "2048 rows of one adapter, rank 16, 4096 -> 6144",
            each + 2048 * 2 * (hidden + 2 * out),
            2 * 2048 * rank * (parts * hidden + out),
        ),
    }
    return [
        _shipped(name, dtype, rows, floors[rows], hot=dtype != "fp32")
        for dtype in ("bf16", "fp16", "fp32")
        for name, rows in (("few rows", FEW_ROWS), ("many rows", MANY_ROWS))
    ]


def _shipped(name: str, dtype: str, rows: int, floor: Floor, hot: bool) -> ShippedKernel:
    numbers = ("y_ptr", "x_ptr", "columns_ptr", "numbers_ptr")
    signature = dict.fromkeys(numbers, f"*{dtype}")
    signature |= {"codes_ptr": "*u8", "halves_ptr": "*fp16", "ints_ptr": "*i32"}
    signature |= {"floats_ptr": "*fp32", "steps_ptr": "*i32", "scratch_ptr": "*fp32"}
    sizes: Sequence[str] = (
        "y_stride", "x_stride", "columns_row_stride", "columns_column_stride",
        "in_features", "out_features", "span_columns", "site",
    )  # fmt: skip
    signature |= dict.fromkeys(sizes, "i32")
    # x is read as columns where it lies; `site` is never looked at.
    constants: dict[str, Any] = _constants(1024, rows)
    aligned = tuple(n for n in signature if n not in ("columns_column_stride", "site"))
    return ShippedKernel(
        f"{name}, {dtype}",
        deltas_kernel,
        signature,
        constants,
        floor,
        aligned,
        _compiled_with(choices(rows).choices[0]),
        hot,
    )
