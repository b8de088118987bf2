"""One record of an adapter's table on rows of a segment: which kind it is, is found out here."""

from __future__ import annotations

import triton
import triton.language as tl

from polydelta.kernels.triton.delta_indices import gather, scatter
from polydelta.kernels.triton.delta_one_bit import add_one_bit_row, add_one_bit_tile
from polydelta.kernels.triton.delta_pages import Matrix
from polydelta.kernels.triton.delta_rows import expand_row, shrink_row
from polydelta.kernels.triton.delta_sparse import add_sparse_row, add_sparse_tile
from polydelta.kernels.triton.delta_tiles import expand_tile, shrink_tile
from polydelta.kernels.triton.delta_vectors import change_vector

# As in adapter_table.py.
RECORD_WORDS = tl.constexpr(16)
NOTHING, LOW_RANK, COLUMNS, ROWS_OF_Y = (tl.constexpr(kind) for kind in range(4))
SPARSE, ONE_BIT, SCALE, BIAS = (tl.constexpr(kind) for kind in range(4, 8))


@triton.jit
def first_matrix(record):
    return Matrix(
        tl.load(record + 5), tl.load(record + 6), tl.load(record + 11), tl.load(record + 12)
    )


@triton.jit
def second_matrix(record):
    return Matrix(
        tl.load(record + 7), tl.load(record + 8), tl.load(record + 14), tl.load(record + 15)
    )


@triton.jit
def low_rank_row(
    y, x, scratch, source, record, kind, in_features, weight, span,
    PAGE_GROUPS: tl.constexpr, RANKS: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """LOW_RANK, COLUMNS or ROWS_OF_Y, of one row. BLOCK_IN, BLOCK_OUT: in groups."""
    scatters = kind == ROWS_OF_Y
    count, bits = tl.load(record + 4), tl.load(record + 10)
    a, indices = first_matrix(record), tl.load(record + 7)
    if kind == COLUMNS:
        gather(scratch, x, 0, 1, source, a.start, count, weight, PAGE_GROUPS, 1, RANKS)
    elif bits == 0:
        shrink_row(
            scratch, x, source, a, count, indices, scatters, in_features, weight, span,
            PAGE_GROUPS, BLOCK_IN, 0,
        )  # fmt: skip
    elif bits == 8:
        shrink_row(
            scratch, x, source, a, count, indices, scatters, in_features, weight, span,
            PAGE_GROUPS, BLOCK_IN // 2, 8,
        )  # fmt: skip
    else:
        shrink_row(
            scratch, x, source, a, count, indices, scatters, in_features, weight, span,
            PAGE_GROUPS, BLOCK_IN // 4, 4,
        )  # fmt: skip
    # Other threads read what was shrunk.
    tl.debug_barrier()
    out_start, out_features = tl.load(record + 2), tl.load(record + 3)
    count, bits = tl.load(record + 4), tl.load(record + 13)
    b = second_matrix(record)
    if scatters:
        scatter(y, 0, 1, scratch, source, b.start, count, span, PAGE_GROUPS, 1, RANKS, 256)
    elif bits == 0:
        expand_row(
            y, scratch, source, b, count, out_start, out_features, span,
            PAGE_GROUPS, BLOCK_OUT, 0,
        )  # fmt: skip
    elif bits == 8:
        expand_row(
            y, scratch, source, b, count, out_start, out_features, span,
            PAGE_GROUPS, BLOCK_OUT // 2, 8,
        )  # fmt: skip
    else:
        expand_row(
            y, scratch, source, b, count, out_start, out_features, span,
            PAGE_GROUPS, BLOCK_OUT // 4, 4,
        )  # fmt: skip


@triton.jit
def low_rank_tile(
    y, y_stride, x, x_stride, rows, scratch, source, record, kind, in_features, weight, span,
    PAGE_GROUPS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    TILE_IN: tl.constexpr, TILE_OUT: tl.constexpr,
):  # fmt: skip
    """`low_rank_row` of each row."""
    scatters = kind == ROWS_OF_Y
    count, bits = tl.load(record + 4), tl.load(record + 10)
    a, indices = first_matrix(record), tl.load(record + 7)
    if kind == COLUMNS:
        gather(scratch, x, x_stride, rows, source, a.start, count, weight, PAGE_GROUPS, ROWS, RANKS)
    elif bits == 0:
        shrink_tile(
            scratch, x, x_stride, rows, source, a, count, indices, scatters, in_features, weight,
            span, PAGE_GROUPS, ROWS, RANKS, TILE_IN, 0,
        )  # fmt: skip
    elif bits == 8:
        shrink_tile(
            scratch, x, x_stride, rows, source, a, count, indices, scatters, in_features, weight,
            span, PAGE_GROUPS, ROWS, RANKS, TILE_IN, 8,
        )  # fmt: skip
    else:
        shrink_tile(
            scratch, x, x_stride, rows, source, a, count, indices, scatters, in_features, weight,
            span, PAGE_GROUPS, ROWS, RANKS, TILE_IN, 4,
        )  # fmt: skip
    # Other threads read what was shrunk.
    tl.debug_barrier()
    out_start, out_features = tl.load(record + 2), tl.load(record + 3)
    count, bits = tl.load(record + 4), tl.load(record + 13)
    b = second_matrix(record)
    if scatters:
        scatter(
            y, y_stride, rows, scratch, source, b.start, count, span, PAGE_GROUPS, ROWS, RANKS, 128
        )
    elif bits == 0:
        expand_tile(
            y, y_stride, rows, scratch, source, b, count, out_start, out_features, span,
            PAGE_GROUPS, ROWS, RANKS, TILE_OUT, 0,
        )  # fmt: skip
    elif bits == 8:
        expand_tile(
            y, y_stride, rows, scratch, source, b, count, out_start, out_features, span,
            PAGE_GROUPS, ROWS, RANKS, TILE_OUT, 8,
        )  # fmt: skip
    else:
        expand_tile(
            y, y_stride, rows, scratch, source, b, count, out_start, out_features, span,
            PAGE_GROUPS, ROWS, RANKS, TILE_OUT, 4,
        )  # fmt: skip


@triton.jit
def other_row(y, x, source, record, kind, in_features, weight, span, PAGE_GROUPS: tl.constexpr):
    """SPARSE, ONE_BIT, SCALE or BIAS, of one row."""
    out_start, out_features = tl.load(record + 2), tl.load(record + 3)
    a, b = tl.load(record + 5), tl.load(record + 7)
    if kind == SPARSE:
        add_sparse_row(y, x, source, a, b, tl.load(record + 9), weight, span, PAGE_GROUPS)
    elif kind == ONE_BIT:
        bits = first_matrix(record)
        add_one_bit_row(
            y, x, source, bits, b, out_start, out_features, in_features, weight, span, PAGE_GROUPS
        )
    else:
        change_vector(
            y, 0, 1, source, a, out_start, out_features, weight, kind == SCALE, span,
            PAGE_GROUPS, 1, 1024,
        )  # fmt: skip


@triton.jit
def other_tile(
    y, y_stride, x, x_stride, columns, columns_row_stride, columns_column_stride, rows,
    source, record, kind, in_features, weight, span, PAGE_GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`other_row` of each row."""
    out_start, out_features = tl.load(record + 2), tl.load(record + 3)
    a, b = tl.load(record + 5), tl.load(record + 7)
    if kind == SPARSE:
        add_sparse_tile(
            y, y_stride, columns, columns_row_stride, columns_column_stride, rows, source,
            a, b, tl.load(record + 9), weight, span, PAGE_GROUPS, ROWS,
        )  # fmt: skip
    elif kind == ONE_BIT:
        bits = first_matrix(record)
        add_one_bit_tile(
            y, y_stride, x, x_stride, rows, source, bits, b, out_start, out_features,
            in_features, weight, span, PAGE_GROUPS, ROWS,
        )  # fmt: skip
    else:
        change_vector(
            y, y_stride, rows, source, a, out_start, out_features, weight, kind == SCALE, span,
            PAGE_GROUPS, ROWS, 128,
        )  # fmt: skip
