"""The halves that Columns and Rows do not share with low-rank deltas.

Columns take entries of x in the place of a product, Rows add to single columns of y.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polydelta.kernels.triton.delta_pages import Span, add_to, load_ints
from polydelta.kernels.triton.products import add_product

BLOCK_INDICES = tl.constexpr(16)


@triton.jit
def picked_ranks(source, indices, ranks, count, span, scatters, PAGE_GROUPS: tl.constexpr):
    """Which of the ranks there are, and if they scatter, those whose index is in the span; and the
    indices."""
    there = ranks < count
    index = load_ints(source, indices, ranks, there & scatters, span.start, PAGE_GROUPS)
    return there & (index >= span.start) & (index < span.stop), index


@triton.jit(noinline=True)
def gather(
    scratch, x, x_stride, rows, source, indices, count, weight,
    PAGE_GROUPS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """`scratch[:, i] = weight * x[:, indices[i]]`."""
    m = tl.arange(0, ROWS)[:, None]
    for first in range(0, count, BLOCK_INDICES):
        ranks = first + tl.arange(0, BLOCK_INDICES)
        index = load_ints(source, indices, ranks, ranks < count, 0, PAGE_GROUPS)
        own = (m < rows) & (ranks < count)[None, :]
        inputs = tl.load(x + (m * x_stride + index[None, :]), mask=own, other=0).to(tl.float32)
        tl.store(scratch + (m * RANKS + ranks[None, :]), inputs * weight, mask=own)


@triton.jit(noinline=True)
def scatter(
    y, y_stride, rows, scratch, source, indices, count, span,
    PAGE_GROUPS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """`y[:, indices[i]] += scratch[:, i]`, of columns in the span. Each column is summed by itself,
    for an index may occur several times."""
    m = tl.arange(0, ROWS)[:, None]
    for begin in range(span.start, span.stop, BLOCK_OUT):
        n = begin + tl.arange(0, BLOCK_OUT)
        block = Span(begin, tl.minimum(begin + BLOCK_OUT, span.stop))
        total = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
        for first in range(0, count, BLOCK_INDICES):
            ranks = first + tl.arange(0, BLOCK_INDICES)
            picked, index = picked_ranks(source, indices, ranks, count, block, True, PAGE_GROUPS)
            if tl.max(picked.to(tl.int32), 0) > 0:
                # [BLOCK_INDICES, BLOCK_OUT]
                here = ((index[:, None] == n[None, :]) & picked[:, None]).to(tl.float32)
                own = (m < rows) & picked[None, :]
                shrunk = tl.load(scratch + (m * RANKS + ranks[None, :]), mask=own, other=0)
                if ROWS == 1:
                    total += tl.sum(tl.trans(shrunk) * here, 0)[None, :]
                else:
                    total = add_product(total, shrunk, here)
        own = (m < rows) & (n < block.stop)[None, :]
        add_to(y + (m * y_stride + n[None, :]), total, own)
