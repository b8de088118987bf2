"""Prefill attention: runs of tokens after whatever their sequences have in the KV cache already
(flash attention, arXiv:2205.14135, arXiv:2307.08691).

Rows of a tile are heads of tokens: the heads of one kv head, token after token, so that all of them
share the tile of KV that is at hand. Sequences of any lengths are cut into such tiles; none is
padded to another's length.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton.attention_tiles import (
    LOWEST,
    Tiles,
    constants,
    key_pointers,
    scale,
    softmax_step,
)
from polydelta.kernels.triton.products import add_product

# Integers of a tile before the page ids: its sequence's first row in the batch, length and context,
# where the id of its page 0 is or would be, and the tile's first row among the sequence's.
HEADER_INTS = 5


def prefill(
    shape: AttentionShape,
    tiles: Tiles,
    count: int,
    table: Tensor,
    queries: Tensor,
    kv: Tensor,
    out: Tensor,
) -> None:
    """count: of the tiles, whose headers come first in the table."""
    prefill_kernel[(shape.num_kv_heads, count)](
        queries, kv, table, out, queries.stride(0), scale(shape),
        **prefill_constants(shape, tiles), **tiles.options,
    )  # fmt: skip


def prefill_constants(shape: AttentionShape, tiles: Tiles) -> dict[str, int]:
    return constants(shape, tiles) | {"WINDOW": shape.window or 0}


@triton.jit
def prefill_kernel(
    queries_ptr,
    kv_ptr,
    table_ptr,
    out_ptr,
    query_stride,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """A program: one tile of rows of one kv head.

    queries: `[tokens, HEADS, HEAD_DIM]`, rows query_stride apart; kv: `[pages, 2, PAGE_TOKENS,
    KV_HEADS, HEAD_DIM]`; out: `[tokens, HEADS, HEAD_DIM]`, dense.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(0)
    header_ptr = table_ptr + tl.program_id(1) * 5
    start = tl.load(header_ptr)
    length = tl.load(header_ptr + 1)
    context = tl.load(header_ptr + 2)
    pages_ptr = table_ptr + tl.load(header_ptr + 3)
    first_row = tl.load(header_ptr + 4)

    query, head, inside_run = split_rows(first_row, length, kv_head, GROUP, BLOCK_ROWS)
    position = context - length + query
    feature = tl.arange(0, BLOCK_DIM)
    in_head = feature < HEAD_DIM
    place = (start + query).to(tl.int64) * query_stride + head * HEAD_DIM
    queries = tl.load(
        queries_ptr + place[:, None] + feature[None, :],
        mask=inside_run[:, None] & in_head[None, :],
        other=0.0,
    )

    # What the tile's rows see together: from the first's oldest token to the last's own.
    seen = first_row * 0
    if WINDOW > 0:
        seen = tl.maximum(context - length + first_row // GROUP + 1 - WINDOW, 0)
    last = tl.minimum((first_row + BLOCK_ROWS - 1) // GROUP, length - 1)
    stop = context - length + last + 1
    peak = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for first in range(seen // BLOCK_KV * BLOCK_KV, stop, BLOCK_KV):
        tokens = first + tl.arange(0, BLOCK_KV)
        inside = (tokens >= seen) & (tokens < stop)
        keys_ptr = key_pointers(
            kv_ptr, pages_ptr, tokens, inside, kv_head, feature, KV_HEADS, HEAD_DIM, PAGE_TOKENS
        )
        in_tile = inside[:, None] & in_head[None, :]
        keys = tl.load(keys_ptr, mask=in_tile, other=0.0)
        values = tl.load(keys_ptr + PAGE_TOKENS * KV_HEADS * HEAD_DIM, mask=in_tile, other=0.0)
        nothing = tl.zeros([BLOCK_ROWS, BLOCK_KV], tl.float32)
        scores = add_product(nothing, queries, tl.trans(keys)) * scale
        visible = tokens[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= tokens[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible & inside[None, :], scores, float("-inf"))
        weights, shrink, peak, total = softmax_step(scores, peak, total)
        sums = add_product(sums * shrink[:, None], weights.to(values.dtype), values)

    # No less than 1, the weight of the highest score, but in rows that are not stored.
    mixed = sums / tl.maximum(total, 1.0)[:, None]
    # Loaded again, and what follows from it computed again: kept over the loop it takes some 40
    # registers (of 255 where groups are of 4 and heads of 128, on Ampere), and more would spill.
    first_row = tl.load(header_ptr + 4, volatile=True)
    query, head, inside_run = split_rows(first_row, length, kv_head, GROUP, BLOCK_ROWS)
    place = ((start + query).to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(
        out_ptr + place[:, None] + feature[None, :],
        mixed.to(out_ptr.dtype.element_ty),
        mask=inside_run[:, None] & in_head[None, :],
    )


@triton.jit
def split_rows(first_row, length, kv_head, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Of a tile's rows: the query in its sequence, the head, and whether there is such a query."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    query = row // GROUP
    return query, kv_head * GROUP + row % GROUP, query < length
