"""One-bit deltas (BitDelta, arXiv:2402.10193): signs are unpacked in registers, those of 128 inputs
from each 16 bytes."""

from __future__ import annotations

import triton
import triton.language as tl

from polydelta.kernels.triton.delta_pages import CHUNK_BYTES, add_to, in_pool, load_floats, own_part
from polydelta.kernels.triton.products import add_product

CHUNK = tl.constexpr(CHUNK_BYTES)
# Outputs, and chunks of each, at a time: of one row, and of a tile.
ROW_OUT, ROW_CHUNKS = tl.constexpr(16), tl.constexpr(32)
TILE_OUT, TILE_CHUNKS = tl.constexpr(32), tl.constexpr(1)


@triton.jit
def load_chunks(source, bits, outs, chunks, wanted, PAGE_GROUPS: tl.constexpr):
    """`[outs, chunks, CHUNK]` int32, 8 signs in each. bits: a Matrix, its stride in chunks."""
    units = bits.start * 4 + outs[:, None] * bits.stride + chunks[None, :]
    at = in_pool(source, units, wanted, PAGE_GROUPS * 4, CHUNK)
    places = at[:, :, None] + tl.arange(0, CHUNK)[None, None, :]
    return tl.load(source.codes + places, mask=wanted[:, :, None], other=0).to(tl.int32)


@triton.jit(noinline=True)
def add_one_bit_row(
    y, x, source, bits, scale_start, out_start, out_features, in_features, weight, span,
    PAGE_GROUPS: tl.constexpr,
):  # fmt: skip
    """Of one row; columns of y in the span."""
    scale = weight * load_floats(source, scale_start, scale_start * 0, True, PAGE_GROUPS)
    part = own_part(span, out_start, out_features)
    in_chunks = tl.cdiv(in_features, 8 * CHUNK)
    for begin in range(part.start, part.stop, ROW_OUT):
        outs = begin + tl.arange(0, ROW_OUT)
        total = tl.zeros((ROW_OUT, ROW_CHUNKS), tl.float32)
        for chunk in range(0, in_chunks, ROW_CHUNKS):
            chunks = chunk + tl.arange(0, ROW_CHUNKS)
            wanted = (outs < part.stop)[:, None] & (chunks < in_chunks)[None, :]
            signs = load_chunks(source, bits, outs, chunks, wanted, PAGE_GROUPS)
            k = (chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]) * 8
            for place in range(8):
                inside = k + place < in_features
                inputs = tl.load(x + (k + place), mask=inside, other=0).to(tl.float32)[None]
                total += tl.sum(tl.where(((signs >> place) & 1) != 0, inputs, -inputs), 2)
        add_to(y + (out_start + outs), tl.sum(total, 1) * scale, outs < part.stop)


@triton.jit(noinline=True)
def add_one_bit_tile(
    y, y_stride, x, x_stride, rows, source, bits, scale_start, out_start, out_features, in_features,
    weight, span, PAGE_GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each row."""
    BLOCK_IN: tl.constexpr = 8 * CHUNK * TILE_CHUNKS
    scale = weight * load_floats(source, scale_start, scale_start * 0, True, PAGE_GROUPS)
    part = own_part(span, out_start, out_features)
    in_chunks = tl.cdiv(in_features, 8 * CHUNK)
    m = tl.arange(0, ROWS)[:, None]
    for begin in range(part.start, part.stop, TILE_OUT):
        outs = begin + tl.arange(0, TILE_OUT)
        total = tl.zeros((ROWS, TILE_OUT), tl.float32)
        for chunk in range(0, in_chunks, TILE_CHUNKS):
            chunks = chunk + tl.arange(0, TILE_CHUNKS)
            wanted = (outs < part.stop)[:, None] & (chunks < in_chunks)[None, :]
            packed = load_chunks(source, bits, outs, chunks, wanted, PAGE_GROUPS)
            ones = (packed[:, :, :, None] >> tl.arange(0, 8)[None, None, None, :]) & 1
            signs = (ones * 2 - 1).to(tl.float32).reshape((TILE_OUT, BLOCK_IN))
            k = (tl.arange(0, BLOCK_IN) + chunk * (8 * CHUNK))[None, :]
            own = (m < rows) & (k < in_features)
            inputs = tl.load(x + (m * x_stride + k), mask=own, other=0)
            total = add_product(total, inputs, tl.trans(signs.to(inputs.dtype)))
        own = (m < rows) & (outs < part.stop)[None, :]
        add_to(y + (m * y_stride + out_start + outs[None, :]), total * scale, own)
