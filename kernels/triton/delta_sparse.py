"""Sparse deltas: `y += x @ dW.T`, dW in CSR form, whose entries lie in pages."""

from __future__ import annotations

import triton
import triton.language as tl

from polydelta.kernels.triton.delta_pages import add_to, in_vector, load_ints

# Outputs, and entries of each, that are read at a time: of one row, and of a tile.
ROW_OUT, ROW_ENTRIES = tl.constexpr(64), tl.constexpr(64)
TILE_OUT, TILE_ENTRIES = tl.constexpr(16), tl.constexpr(4)


@triton.jit
def entry_ranges(source, pointers, n, stop, PAGE_GROUPS: tl.constexpr):
    """Where the entries of outputs begin and end; nowhere for those from `stop` on."""
    start = load_ints(source, pointers, n, n < stop, 0, PAGE_GROUPS)
    return start, load_ints(source, pointers, n + 1, n < stop, 0, PAGE_GROUPS)


@triton.jit
def load_entries(source, columns, values, entries, wanted, PAGE_GROUPS: tl.constexpr):
    """Columns, and values in float32."""
    GROUP: tl.constexpr = 512 // source.numbers.dtype.element_ty.primitive_bitwidth
    at = in_vector(source, values, entries, wanted, PAGE_GROUPS, GROUP)
    value = tl.load(source.numbers + at, mask=wanted, other=0).to(tl.float32)
    return load_ints(source, columns, entries, wanted, 0, PAGE_GROUPS), value


@triton.jit(noinline=True)
def add_sparse_row(
    y, x, source, pointers, columns, values, weight, span, PAGE_GROUPS: tl.constexpr
):
    """Of one row; columns of y in the span."""
    for begin in range(span.start, span.stop, ROW_OUT):
        n = begin + tl.arange(0, ROW_OUT)
        start, stop = entry_ranges(source, pointers, n, span.stop, PAGE_GROUPS)
        total = tl.zeros((ROW_OUT,), tl.float32)
        for first in range(0, tl.max(stop - start, 0), ROW_ENTRIES):
            entries = start[:, None] + (first + tl.arange(0, ROW_ENTRIES))[None, :]
            wanted = entries < stop[:, None]
            index, value = load_entries(source, columns, values, entries, wanted, PAGE_GROUPS)
            inputs = tl.load(x + index, mask=wanted, other=0).to(tl.float32)
            total += tl.sum(value * inputs, 1)
        add_to(y + n, total * weight, n < span.stop)


@triton.jit(noinline=True)
def add_sparse_tile(
    y, y_stride, x, x_row_stride, x_column_stride, rows, source, pointers, columns, values,
    weight, span, PAGE_GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each row. What is read of x are columns: they should be dense."""
    m = tl.arange(0, ROWS)[None, :]
    for begin in range(span.start, span.stop, TILE_OUT):
        n = begin + tl.arange(0, TILE_OUT)
        start, stop = entry_ranges(source, pointers, n, span.stop, PAGE_GROUPS)
        total = tl.zeros((TILE_OUT, ROWS), tl.float32)
        for first in range(0, tl.max(stop - start, 0), TILE_ENTRIES):
            entries = start[:, None] + (first + tl.arange(0, TILE_ENTRIES))[None, :]
            wanted = entries < stop[:, None]
            index, value = load_entries(source, columns, values, entries, wanted, PAGE_GROUPS)
            at = index.to(tl.int64)[:, :, None] * x_column_stride + (m * x_row_stride)[None]
            own = wanted[:, :, None] & (m < rows)[None]
            inputs = tl.load(x + at, mask=own, other=0).to(tl.float32)
            total += tl.sum(value[:, :, None] * inputs, 1)
        own = (m < rows) & (n < span.stop)[:, None]
        add_to(y + (m * y_stride + n[:, None]), total * weight, own)
