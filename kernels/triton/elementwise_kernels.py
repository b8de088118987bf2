"""What is done to each token for itself, in Triton: see `elementwise.py`.

All of it is bound by memory: a tile is read once in 16-byte loads, computed in float32, rounded
where `ReferenceKernels` rounds, and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normed(x, weight, eps, SIZE: tl.constexpr):
    """x: `[ROWS, BLOCK]`, 0 beyond SIZE columns; weight: `[BLOCK]` -> float32."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)
    return (wide * scale[:, None]).to(x.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    token_stride,
    head_stride,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row is a head of a token; out is dense."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    here = (row < rows)[:, None] & (column < SIZE)
    place = (row // HEADS).to(tl.int64) * token_stride + row % HEADS * head_stride
    weight = tl.load(weight_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < SIZE, other=0.0)
    x = tl.load(x_ptr + place[:, None] + column, mask=here, other=0.0)
    out = out_ptr + row.to(tl.int64)[:, None] * SIZE + column
    tl.store(out, _normed(x, weight, eps, SIZE).to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    out_ptr,
    rows,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    here = (row < rows)[:, None] & (column < SIZE)
    place = row.to(tl.int64)[:, None] * SIZE + column
    weight = tl.load(weight_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < SIZE, other=0.0)
    x = tl.load(x_ptr + place, mask=here, other=0.0)
    y = tl.load(y_ptr + place, mask=here, other=0.0)
    total = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
    tl.store(x_ptr + place, total, mask=here)
    normed = _normed(total, weight, eps, SIZE).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, normed, mask=here)


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row is a head of a token; its halves turn together, in place."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    here = (row < rows)[:, None] & (column < HALF)
    token = (row // HEADS).to(tl.int64)
    first_ptr = x_ptr + (token * token_stride + row % HEADS * head_stride)[:, None] + column
    table = token[:, None] * (2 * HALF) + column
    first = tl.load(first_ptr, mask=here, other=0.0)
    second = tl.load(first_ptr + HALF, mask=here, other=0.0)
    first_turned = _turned(first, second, cos_ptr + table, sin_ptr + table, here)
    second_turned = _turned(second, first, cos_ptr + table + HALF, sin_ptr + table + HALF, here)
    tl.store(first_ptr, first_turned, mask=here)
    tl.store(first_ptr + HALF, second_turned, mask=here)


@triton.jit
def _turned(x, other, cos_ptr, sin_ptr, here):
    """Each product is rounded to the dtype of x, then the sum."""
    cos = tl.load(cos_ptr, mask=here, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr, mask=here, other=0.0).to(tl.float32)
    kept = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    moved = (other.to(tl.float32) * sin).to(x.dtype).to(tl.float32)
    return (kept + moved).to(x.dtype)


@triton.jit
def silu_mul_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """One program computes BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < size
    gate_ptr = x_ptr + token * (2 * size) + column
    gate = tl.load(gate_ptr, mask=here, other=0.0)
    up = tl.load(gate_ptr + size, mask=here, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    out = (silu * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + token * size + column, out, mask=here)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["rows_ptr"])
def gather_kernel(
    table_ptr,
    rows_ptr,
    out_ptr,
    count,
    stride,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program copies BLOCK columns of ROWS rows."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    here = (place < count)[:, None] & (column < SIZE)
    row = tl.load(rows_ptr + place, mask=place < count, other=0).to(tl.int64)
    values = tl.load(table_ptr + row[:, None] * stride + column, mask=here)
    tl.store(out_ptr + place.to(tl.int64)[:, None] * SIZE + column, values, mask=here)
