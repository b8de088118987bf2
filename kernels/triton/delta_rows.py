"""Low-rank deltas of one row: registers and 16-byte loads alone (BGMV of Punica, arXiv:2310.18547).

What x is shrunk to lies in scratch memory of the program's own, `[ranks]` float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polydelta.kernels.triton.delta_indices import picked_ranks
from polydelta.kernels.triton.delta_matrices import lanes, load_groups, load_scales
from polydelta.kernels.triton.delta_pages import add_to, own_part

BLOCK_RANKS = tl.constexpr(16)


@triton.jit(noinline=True)
def shrink_row(
    scratch, x, source, matrix, count, indices, scatters, in_features, weight, span,
    PAGE_GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """`scratch = weight * A @ x`. scatters: whether A's rows are for single columns of y, and only
    those in the span matter."""
    VEC: tl.constexpr = 128 // source.numbers.dtype.element_ty.primitive_bitwidth
    GROUP: tl.constexpr = 4 * VEC
    in_groups = tl.cdiv(in_features, GROUP)
    for first in range(0, count, BLOCK_RANKS):
        ranks = first + tl.arange(0, BLOCK_RANKS)
        picked, _ = picked_ranks(source, indices, ranks, count, span, scatters, PAGE_GROUPS)
        if tl.max(picked.to(tl.int32), 0) > 0:
            total = tl.zeros((BLOCK_RANKS, BLOCK_GROUPS, 4), tl.float32)
            for group in range(0, in_groups, BLOCK_GROUPS):
                groups = group + tl.arange(0, BLOCK_GROUPS)
                k = groups[:, None, None] * GROUP + lanes(VEC)[None]
                inputs = tl.load(x + k, mask=k < in_features, other=0).to(tl.float32)
                wanted = picked[:, None] & (groups < in_groups)[None, :]
                a = load_groups(source, matrix, ranks, groups, wanted, PAGE_GROUPS, VEC, BITS)
                products = tl.sum(a.to(tl.float32) * inputs[None], 3)
                if BITS != 0:
                    scales = load_scales(source, matrix, ranks, groups, wanted, PAGE_GROUPS, GROUP)
                    products *= scales[:, :, None]
                total += products
            tl.store(scratch + ranks, tl.sum(tl.sum(total, 2), 1) * weight, mask=picked)


@triton.jit(noinline=True)
def expand_row(
    y, scratch, source, matrix, count, out_start, out_features, span,
    PAGE_GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """`y[out_start : out_start + out_features] += scratch @ B`, of columns in the span."""
    VEC: tl.constexpr = 128 // source.numbers.dtype.element_ty.primitive_bitwidth
    GROUP: tl.constexpr = 4 * VEC
    part = own_part(span, out_start, out_features)
    out_groups = tl.cdiv(part.stop, GROUP)
    for group in range(part.start // GROUP, out_groups, BLOCK_GROUPS):
        groups = group + tl.arange(0, BLOCK_GROUPS)
        total = tl.zeros((BLOCK_GROUPS, 4, VEC), tl.float32)
        for first in range(0, count, BLOCK_RANKS):
            ranks = first + tl.arange(0, BLOCK_RANKS)
            shrunk = tl.load(scratch + ranks, mask=ranks < count, other=0)
            wanted = (ranks < count)[:, None] & (groups < out_groups)[None, :]
            b = load_groups(source, matrix, ranks, groups, wanted, PAGE_GROUPS, VEC, BITS)
            if BITS == 0:
                total += tl.sum(b.to(tl.float32) * shrunk[:, None, None, None], 0)
            else:
                scales = load_scales(source, matrix, ranks, groups, wanted, PAGE_GROUPS, GROUP)
                factors = shrunk[:, None] * scales
                total += tl.sum(b.to(tl.float32) * factors[:, :, None, None], 0)
        j = groups[:, None, None] * GROUP + lanes(VEC)[None]
        add_to(y + (out_start + j), total, (j >= part.start) & (j < part.stop))
