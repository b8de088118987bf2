"""Blocks of matrices in pages, plain or quantised."""

from __future__ import annotations

import triton
import triton.language as tl

from polydelta.kernels.triton.delta_pages import in_pool

# Columns of a quantised matrix that share a scale; as in kernels/delta_weights.py.
SCALE_COLUMNS = tl.constexpr(32)
# Of 4-bit codes: 0 and 0.
NO_CODES = tl.constexpr(0x88)


@triton.jit
def lanes(VEC: tl.constexpr):
    """The columns of a group: `[4, VEC]`, VEC of them to a thread."""
    return tl.arange(0, 4)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load_groups(
    source, matrix, rows, groups, wanted,
    PAGE_GROUPS: tl.constexpr, VEC: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Groups of `4 * VEC` columns, as many as there are numbers in 64 bytes: `[R, G, 4, VEC]` of
    rows `[R]` and groups `[G]`. Of a quantised matrix (BITS: 8 or 4, else 0) the codes alone."""
    GROUP: tl.constexpr = 4 * VEC
    UNIT: tl.constexpr = 64 if BITS == 0 else GROUP * BITS // 8
    units = (matrix.start + rows * matrix.stride)[:, None] * (64 // UNIT) + groups[None, :]
    mask = wanted[:, :, None, None]
    if BITS == 0:
        at = in_pool(source, units, wanted, PAGE_GROUPS, GROUP)
        tile = tl.load(
            source.numbers + (at[:, :, None, None] + lanes(VEC)[None, None]), mask=mask, other=0
        )
    else:
        at = in_pool(source, units, wanted, PAGE_GROUPS * (64 // UNIT), UNIT)[:, :, None, None]
        if BITS == 8:
            codes = tl.load(source.codes + (at + lanes(VEC)[None, None]), mask=mask, other=0)
            tile = codes.to(tl.int8, bitcast=True)
        else:
            places = at + lanes(VEC // 2)[None, None]
            pairs = tl.load(source.codes + places, mask=mask, other=NO_CODES).to(tl.int32)
            codes = tl.join(pairs & 15, pairs >> 4)
            tile = codes.reshape((rows.shape[0], groups.shape[0], 4, VEC)) - 8
    return tile


@triton.jit
def load_scales(
    source, matrix, rows, groups, wanted, PAGE_GROUPS: tl.constexpr, GROUP: tl.constexpr
):
    """Of the same groups of GROUP columns: `[R, G]` float32."""
    index = groups[None, :] * GROUP // SCALE_COLUMNS
    units = (matrix.scales + rows * matrix.scales_stride)[:, None] + index // 32
    at = in_pool(source, units, wanted, PAGE_GROUPS, 32) + index % 32
    return tl.load(source.halves + at, mask=wanted, other=0).to(tl.float32)


@triton.jit
def load_tile(source, matrix, rows, groups, wanted, PAGE_GROUPS: tl.constexpr, BITS: tl.constexpr):
    """The numbers, for tensor cores: `[R, G * GROUP]`."""
    VEC: tl.constexpr = 128 // source.numbers.dtype.element_ty.primitive_bitwidth
    GROUP: tl.constexpr = 4 * VEC
    tile = load_groups(source, matrix, rows, groups, wanted, PAGE_GROUPS, VEC, BITS)
    if BITS != 0:
        scales = load_scales(source, matrix, rows, groups, wanted, PAGE_GROUPS, GROUP)
        tile = tile.to(tl.float32) * scales[:, :, None, None]
    tile = tile.to(source.numbers.dtype.element_ty)
    return tile.reshape((rows.shape[0], groups.shape[0] * GROUP))
