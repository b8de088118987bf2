"""Keys and values on their way into pages, each token encoded by itself, in one launch.

The bytes are those of `polydelta.kernels.kv_formats`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.kv_formats import codes
from polydelta.kernels.triton.kv_pages import Pages

MOST = tl.constexpr(codes.MOST)
INFINITY = tl.constexpr(float("inf"))


def encode(pages: Pages, memory: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
    """keys, values: `[tokens, kv_heads, head_dim]`; places: `[tokens]` int64, page * block_size +
    place, below 0 for those that are stored nowhere; memory: uint8 pages."""
    if not len(places):
        return
    keys, values = (
        x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (keys, values)
    )
    encode_kernel[(len(places), pages.kv_heads)](
        memory, keys, values, places, keys.stride(0), values.stride(0), **encode_constants(pages),
        **options(pages),
    )  # fmt: skip


def encode_constants(pages: Pages) -> dict[str, object]:
    return {"PAGES": pages, "BLOCK": max(16, triton.next_power_of_2(pages.head_dim))}


def options(pages: Pages) -> dict[str, int]:
    """A row is little work, but where each channel is compared with each."""
    return {"num_warps": 4 if pages.family == "mustafar" else 1, "num_stages": 2}


@triton.jit
def encode_kernel(
    pages_ptr,
    keys_ptr,
    values_ptr,
    places_ptr,
    key_stride,
    value_stride,
    PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: one token's keys and values of one kv head."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.load(places_ptr + token)
    if place < 0:
        return
    page = pages_ptr + place // PAGES.size * PAGES.page_bytes
    row = (place % PAGES.size).to(tl.int32) * PAGES.kv_heads + head
    feature = tl.arange(0, BLOCK)
    in_head = feature < PAGES.head_dim
    at = head * PAGES.head_dim + feature
    keys = tl.load(keys_ptr + token * key_stride + at, mask=in_head, other=0.0)
    values = tl.load(values_ptr + token * value_stride + at, mask=in_head, other=0.0)
    KEYS_AT: tl.constexpr = PAGES.keys
    VALUES_AT: tl.constexpr = PAGES.values
    encode_row(keys, page, row, KEYS_AT, PAGES, BLOCK)
    encode_row(values, page, row, VALUES_AT, PAGES, BLOCK)


@triton.jit
def encode_row(x, page, row, AT: tl.constexpr, PAGES: tl.constexpr, BLOCK: tl.constexpr):
    """x: `[BLOCK]`, 0 beyond the head; page: where it begins; row: of the page's."""
    feature = tl.arange(0, BLOCK)
    in_head = feature < PAGES.head_dim
    at = row * PAGES.head_dim + feature
    if PAGES.family == "native":
        tl.store((page + AT.codes).to(tl.pointer_type(x.dtype)) + at, x, mask=in_head)
    else:
        wide = x.to(tl.float32)
        finite = tl.abs(wide) < INFINITY
        wide = tl.where(finite, wide, 0.0)
        halves = (page + AT.scales).to(tl.pointer_type(tl.float16))
        if PAGES.family == "int8":
            scaled = scaled_row(wide, halves + row, 127.0)
            codes_ptr = (page + AT.codes).to(tl.pointer_type(tl.int8))
            tl.store(codes_ptr + at, nearest(scaled).to(tl.int8), mask=in_head)
        elif PAGES.family == "fp8":
            scaled = scaled_row(wide, halves + row, 448.0)
            tl.store(page + AT.codes + at, e4m3_of_float(scaled), mask=in_head)
        elif PAGES.family == "int4":
            numbers = ranged_row(wide, in_head, halves + row * 2)
            store_packed(page + AT.codes, row, numbers, 4, PAGES, BLOCK)
        else:
            kept, place = largest(wide, in_head, PAGES.kept, BLOCK)
            store_packed(page + AT.bits, row, kept.to(tl.int32), 1, PAGES, BLOCK)
            numbers_ptr = (page + AT.codes).to(tl.pointer_type(x.dtype)) + row * PAGES.kept
            tl.store(numbers_ptr + place, wide.to(x.dtype), mask=kept)


@triton.jit
def nearest(x):
    """Whole numbers, halves to even ones; below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def step_of(scale):
    """A float16 scale in float32, to divide by: nothing is left of numbers whose scale is 0."""
    wide = scale.to(tl.float32)
    return tl.where(wide > 0, wide, INFINITY)


@triton.jit
def scaled_row(x, scale_ptr, LARGEST: tl.constexpr):
    """Between -LARGEST and LARGEST."""
    scale = tl.minimum(tl.div_rn(tl.max(tl.abs(x), 0), LARGEST), MOST).to(tl.float16)
    tl.store(scale_ptr, scale)
    return tl.minimum(tl.maximum(tl.div_rn(x, step_of(scale)), -LARGEST), LARGEST)


@triton.jit
def ranged_row(x, in_head, scales_ptr):
    """Codes from 0 to 15, int32."""
    least = tl.min(tl.where(in_head, x, INFINITY), 0)
    most = tl.max(tl.where(in_head, x, -INFINITY), 0)
    # In shares, as the difference of two numbers may be beyond float32.
    scale = tl.minimum(tl.div_rn(most, 15.0) - tl.div_rn(least, 15.0), MOST).to(tl.float16)
    zero = tl.minimum(tl.maximum(least, -MOST), MOST).to(tl.float16)
    tl.store(scales_ptr, scale)
    tl.store(scales_ptr + 1, zero)
    numbers = tl.div_rn(x - zero.to(tl.float32), step_of(scale))
    return nearest(tl.minimum(tl.maximum(numbers, 0.0), 15.0)).to(tl.int32)


@triton.jit
def e4m3_of_float(x):
    """Bytes; x: float32, no larger than 448."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits &= 0x7FFFFFFF
    # 3 bits of fraction stay, the nearest or the even ones, and 7 is the exponent of 1, not 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are multiples of 2^-9.
    small = nearest(tl.abs(x) * 512.0).to(tl.int32)
    return (sign | tl.where(bits < (121 << 23), small, normal)).to(tl.uint8)


@triton.jit
def largest(x, in_head, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """Which are the KEPT largest in magnitude, ties to the lower feature, `[BLOCK]`, and how many
    of them come before each."""
    feature = tl.arange(0, BLOCK)
    size = tl.where(in_head, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    ahead = size[None, :] > size[:, None]
    ahead |= (size[None, :] == size[:, None]) & (feature[None, :] < feature[:, None])
    kept = tl.sum(ahead.to(tl.int32), 1) < KEPT
    return kept, tl.cumsum(kept.to(tl.int32), 0) - kept.to(tl.int32)


@triton.jit
def store_packed(
    target, row, numbers, BITS: tl.constexpr, PAGES: tl.constexpr, BLOCK: tl.constexpr
):
    """The first of a byte's in its lowest bits."""
    INSIDE: tl.constexpr = 8 // BITS
    ROW: tl.constexpr = PAGES.head_dim // INSIDE
    shifts = tl.arange(0, INSIDE) * BITS
    packed = tl.sum(tl.reshape(numbers, (BLOCK // INSIDE, INSIDE)) << shifts[None, :], 1)
    byte = tl.arange(0, BLOCK // INSIDE)
    tl.store(target + row * ROW + byte, packed.to(tl.uint8), mask=byte < ROW)
