"""Decode attention: one token of each sequence, long contexts split (flash-decoding,
arXiv:2311.01282). A first kernel computes chunks, a second one joins those of a sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton.attention_chunks import MAX_CHUNKS
from polydelta.kernels.triton.attention_tiles import (
    LOWEST,
    Tiles,
    constants,
    key_pointers,
    scale,
    softmax_step,
)
from polydelta.kernels.triton.products import add_product

# Integers of a share: sequence, row of the batch, where in the table the id of page 0 is or would
# be, context, first token seen, tokens of a chunk, first chunk, end of the chunks.
SHARE_INTS = 8
# Integers of a sequence, after all shares: its row of the batch, its number of chunks. Then come
# page ids.
SEQUENCE_INTS = 2


def decode(
    shape: AttentionShape,
    tiles: Tiles,
    sizes: tuple[int, int, int],
    table: Tensor,
    queries: Tensor,
    kv: Tensor,
    out: Tensor,
) -> None:
    """sizes: how many sequences and shares the table has, and the most chunks of a sequence. What
    is launched depends on nothing in the table."""
    sequences, shares, chunks = sizes
    heads, head_dim = shape.num_heads, shape.head_dim
    sums = torch.empty(sequences, heads, chunks, head_dim, dtype=torch.float32, device=out.device)
    stats = torch.empty(sequences, heads, chunks, 2, dtype=torch.float32, device=out.device)
    decode_kernel[(shape.num_kv_heads, shares)](
        queries, kv, table, sums, stats, queries.stride(0), chunks, scale(shape),
        **constants(shape, tiles), **tiles.options,
    )  # fmt: skip
    combine_kernel[(heads, sequences)](
        sums, stats, table[shares * SHARE_INTS :], out, chunks,
        **combine_constants(shape, tiles), num_warps=4,
    )  # fmt: skip


def combine_constants(shape: AttentionShape, tiles: Tiles) -> dict[str, int]:
    return {
        "HEADS": shape.num_heads,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_DIM": tiles.features,
        "BLOCK_CHUNKS": MAX_CHUNKS,
    }


@triton.jit
def decode_kernel(
    queries_ptr,
    kv_ptr,
    table_ptr,
    sums_ptr,
    stats_ptr,
    query_stride,
    chunks,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program: the heads of one kv head, packed as rows of a tile, over a run of chunks.

    queries: `[tokens, HEADS, HEAD_DIM]`, rows query_stride apart; kv: `[pages, 2, PAGE_TOKENS,
    KV_HEADS, HEAD_DIM]`; sums: `[sequences, HEADS, chunks, HEAD_DIM]` float32; stats: `[sequences,
    HEADS, chunks, 2]` float32, peak and total of each chunk's softmax.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(0)
    share_ptr = table_ptr + tl.program_id(1) * 8
    sequence = tl.load(share_ptr)
    token = tl.load(share_ptr + 1)
    pages_ptr = table_ptr + tl.load(share_ptr + 2)
    context = tl.load(share_ptr + 3)
    seen = tl.load(share_ptr + 4)
    size = tl.load(share_ptr + 5)
    chunk = tl.load(share_ptr + 6)
    end = tl.load(share_ptr + 7)
    if chunk == end:
        return

    row = tl.arange(0, BLOCK_ROWS)
    head = kv_head * GROUP + row
    feature = tl.arange(0, BLOCK_DIM)
    in_head = feature < HEAD_DIM
    in_sums = (row < GROUP)[:, None] & in_head[None, :]
    place = token.to(tl.int64) * query_stride + head * HEAD_DIM
    queries = tl.load(queries_ptr + place[:, None] + feature[None, :], mask=in_sums, other=0.0)
    peak = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    first = seen // BLOCK_KV * BLOCK_KV
    stop = tl.minimum(first + end * size, context)
    for start in range(first + chunk * size, stop, BLOCK_KV):
        tokens = start + tl.arange(0, BLOCK_KV)
        inside = (tokens >= seen) & (tokens < context)
        keys_ptr = key_pointers(
            kv_ptr, pages_ptr, tokens, inside, kv_head, feature, KV_HEADS, HEAD_DIM, PAGE_TOKENS
        )
        in_tile = inside[:, None] & in_head[None, :]
        keys = tl.load(keys_ptr, mask=in_tile, other=0.0)
        values = tl.load(keys_ptr + PAGE_TOKENS * KV_HEADS * HEAD_DIM, mask=in_tile, other=0.0)
        nothing = tl.zeros([BLOCK_ROWS, BLOCK_KV], tl.float32)
        scores = add_product(nothing, queries, tl.trans(keys)) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        weights, shrink, peak, total = softmax_step(scores, peak, total)
        sums = add_product(sums * shrink[:, None], weights.to(values.dtype), values)
        done = start + BLOCK_KV
        if (done >= stop) | ((done - first) % size == 0):
            place = (sequence.to(tl.int64) * HEADS + head) * chunks + (start - first) // size
            tl.store(sums_ptr + place[:, None] * HEAD_DIM + feature[None, :], sums, mask=in_sums)
            tl.store(stats_ptr + place * 2, peak, mask=row < GROUP)
            tl.store(stats_ptr + place * 2 + 1, total, mask=row < GROUP)
            peak = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)


@triton.jit
def combine_kernel(
    sums_ptr,
    stats_ptr,
    sequences_ptr,
    out_ptr,
    chunks,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """A program: one head of one sequence. No chunks give zeros.

    sums, stats: as in `decode_kernel`; out: `[tokens, HEADS, HEAD_DIM]`, dense.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(sequences_ptr + sequence * 2)
    count = tl.load(sequences_ptr + sequence * 2 + 1)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    there = chunk < count
    feature = tl.arange(0, BLOCK_DIM)
    in_head = feature < HEAD_DIM
    place = (sequence.to(tl.int64) * HEADS + head) * chunks + chunk
    peaks = tl.load(stats_ptr + place * 2, mask=there, other=LOWEST)
    totals = tl.load(stats_ptr + place * 2 + 1, mask=there, other=0.0)
    sums = tl.load(
        sums_ptr + place[:, None] * HEAD_DIM + feature[None, :],
        mask=there[:, None] & in_head[None, :],
        other=0.0,
    )
    shares = tl.exp2(peaks - tl.max(peaks, 0))
    # No less than 1, the weight of the highest score, but for a sequence without context.
    total = tl.maximum(tl.sum(shares * totals, 0), 1.0)
    mixed = tl.sum(shares[:, None] * sums, 0) / total
    out = out_ptr + (token.to(tl.int64) * HEADS + head) * HEAD_DIM + feature
    tl.store(out, mixed.to(out_ptr.dtype.element_ty), mask=in_head)
