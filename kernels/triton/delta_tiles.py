"""Low-rank deltas of many rows, on tensor cores (SGMV of Punica, arXiv:2310.18547).

What x is shrunk to lies in scratch memory of the program's own, `[ROWS, RANKS]` float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polydelta.kernels.triton.delta_indices import picked_ranks
from polydelta.kernels.triton.delta_matrices import load_tile
from polydelta.kernels.triton.delta_pages import add_to, own_part
from polydelta.kernels.triton.products import add_product

BLOCK_RANKS = tl.constexpr(32)


@triton.jit(noinline=True)
def shrink_tile(
    scratch, x, x_stride, rows, source, matrix, count, indices, scatters, in_features, weight,
    span, PAGE_GROUPS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """`delta_rows.shrink_row` of each row."""
    GROUP: tl.constexpr = 512 // source.numbers.dtype.element_ty.primitive_bitwidth
    in_groups = tl.cdiv(in_features, GROUP)
    m = tl.arange(0, ROWS)[:, None]
    for first in range(0, count, BLOCK_RANKS):
        ranks = first + tl.arange(0, BLOCK_RANKS)
        picked, _ = picked_ranks(source, indices, ranks, count, span, scatters, PAGE_GROUPS)
        if tl.max(picked.to(tl.int32), 0) > 0:
            total = tl.zeros((ROWS, BLOCK_RANKS), tl.float32)
            for group in range(0, in_groups, BLOCK_GROUPS):
                groups = group + tl.arange(0, BLOCK_GROUPS)
                k = (group * GROUP + tl.arange(0, BLOCK_GROUPS * GROUP))[None, :]
                own = (m < rows) & (k < in_features)
                inputs = tl.load(x + (m * x_stride + k), mask=own, other=0)
                wanted = picked[:, None] & (groups < in_groups)[None, :]
                a = load_tile(source, matrix, ranks, groups, wanted, PAGE_GROUPS, BITS)
                total = add_product(total, inputs, tl.trans(a))
            own = (m < rows) & picked[None, :]
            tl.store(scratch + (m * RANKS + ranks[None, :]), total * weight, mask=own)


@triton.jit(noinline=True)
def expand_tile(
    y, y_stride, rows, scratch, source, matrix, count, out_start, out_features, span,
    PAGE_GROUPS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """`delta_rows.expand_row` of each row."""
    GROUP: tl.constexpr = 512 // source.numbers.dtype.element_ty.primitive_bitwidth
    part = own_part(span, out_start, out_features)
    out_groups = tl.cdiv(part.stop, GROUP)
    m = tl.arange(0, ROWS)[:, None]
    for group in range(part.start // GROUP, out_groups, BLOCK_GROUPS):
        groups = group + tl.arange(0, BLOCK_GROUPS)
        total = tl.zeros((ROWS, BLOCK_GROUPS * GROUP), tl.float32)
        for first in range(0, count, BLOCK_RANKS):
            ranks = first + tl.arange(0, BLOCK_RANKS)
            own = (m < rows) & (ranks < count)[None, :]
            shrunk = tl.load(scratch + (m * RANKS + ranks[None, :]), mask=own, other=0)
            wanted = (ranks < count)[:, None] & (groups < out_groups)[None, :]
            b = load_tile(source, matrix, ranks, groups, wanted, PAGE_GROUPS, BITS)
            total = add_product(total, shrunk.to(b.dtype), b)
        j = (group * GROUP + tl.arange(0, BLOCK_GROUPS * GROUP))[None, :]
        own = (m < rows) & (j >= part.start) & (j < part.stop)
        add_to(y + (m * y_stride + out_start + j), total, own)
