"""Decode attention over pages of any format: one token of each sequence, over all that it sees or
over a list for each kv head. Long ones are split as in `attention_decode`, whose second kernel
joins the chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton.attention_decode import combine_constants, combine_kernel
from polydelta.kernels.triton.attention_tiles import LOWEST, Tiles, scale, softmax_step
from polydelta.kernels.triton.kv_formats import KEYS, VALUES, find_tokens, load_tile
from polydelta.kernels.triton.kv_pages import Pages
from polydelta.kernels.triton.kv_tables import SHARE_INTS, DecodeTable
from polydelta.kernels.triton.products import add_product


def decode(
    shape: AttentionShape,
    pages: Pages,
    table: DecodeTable,
    memory: Tensor,
    opened: Tensor | None,
    queries: Tensor,
    out: Tensor,
    lists: Tensor | None = None,
    unit: int = 0,
) -> None:
    """memory: uint8 pages. opened: `[slots, block_size, 2, kv_heads, head_dim]`. lists:
    `[sequences, kv_heads, n]` int32, ascending; each entry stands for `unit` tokens, from `entry *
    unit` on. queries, out: `[tokens, heads, head_dim]`, rows of queries dense in themselves. What
    is launched depends on nothing in the table."""
    sequences, shares, chunks = table.sizes
    heads, head_dim = shape.num_heads, shape.head_dim
    sums = torch.empty(sequences, heads, chunks, head_dim, dtype=torch.float32, device=out.device)
    stats = torch.empty(sequences, heads, chunks, 2, dtype=torch.float32, device=out.device)
    ints = table.ints.tensor
    # Where there is none of them, a pointer that nothing is read from.
    decode_kernel[(shape.num_kv_heads, shares)](
        queries, memory, queries if opened is None else opened, ints if lists is None else lists,
        ints, sums, stats, queries.stride(0), chunks, 0 if lists is None else lists.shape[2],
        scale(shape), **decode_constants(shape, pages, table.tiles, unit), **table.tiles.options,
    )  # fmt: skip
    combine_kernel[(heads, sequences)](
        sums, stats, ints[shares * SHARE_INTS :], out, chunks,
        **combine_constants(shape, table.tiles), num_warps=4,
    )  # fmt: skip


def decode_constants(
    shape: AttentionShape, pages: Pages, tiles: Tiles, unit: int
) -> dict[str, object]:
    return {
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "PAGES": pages,
        "UNIT": unit,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_KV": tiles.kv,
        "BLOCK_DIM": tiles.features,
    }


# The width of lists changes from step to step.
@triton.jit(do_not_specialize=["width"])
def decode_kernel(
    queries_ptr,
    pages_ptr,
    open_ptr,
    lists_ptr,
    table_ptr,
    sums_ptr,
    stats_ptr,
    query_stride,
    chunks,
    width,
    scale,
    GROUP: tl.constexpr,
    PAGES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program: the heads of one kv head, packed as rows of a tile, over a run of chunks.

    lists: `[sequences, kv_heads, width]`, where UNIT is not 0; sums, stats: as in
    `attention_decode.decode_kernel`.
    """
    HEAD_DIM: tl.constexpr = PAGES.head_dim
    HEADS: tl.constexpr = GROUP * PAGES.kv_heads
    kv_head = tl.program_id(0)
    share_ptr = table_ptr + tl.program_id(1) * 12
    sequence = tl.load(share_ptr)
    token = tl.load(share_ptr + 1)
    ids_ptr = table_ptr + tl.load(share_ptr + 2)
    context = tl.load(share_ptr + 3)
    slot = tl.load(share_ptr + 4)
    oldest = tl.load(share_ptr + 5)
    sinks = tl.load(share_ptr + 6)
    gap = tl.load(share_ptr + 7)
    count = tl.load(share_ptr + 8)
    size = tl.load(share_ptr + 9)
    chunk = tl.load(share_ptr + 10)
    end = tl.load(share_ptr + 11)
    if chunk == end:
        return

    row = tl.arange(0, BLOCK_ROWS)
    head = kv_head * GROUP + row
    feature = tl.arange(0, BLOCK_DIM)
    in_sums = (row < GROUP)[:, None] & (feature < HEAD_DIM)[None, :]
    place = token.to(tl.int64) * query_stride + head * HEAD_DIM
    queries = tl.load(queries_ptr + place[:, None] + feature[None, :], mask=in_sums, other=0.0)
    list_ptr = lists_ptr + (sequence.to(tl.int64) * PAGES.kv_heads + kv_head) * width
    peak = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    stop = tl.minimum(end * size, count)
    for start in range(chunk * size, stop, BLOCK_KV):
        number = start + tl.arange(0, BLOCK_KV)
        inside = number < count
        if UNIT == 0:
            positions = number + oldest + tl.where(number >= sinks, gap, 0)
        else:
            entries = tl.load(list_ptr + number // UNIT, mask=inside, other=0)
            positions = entries * UNIT + number % UNIT
            inside &= positions >= oldest
        tokens = find_tokens(
            pages_ptr, open_ptr, ids_ptr, positions, inside, context, slot, kv_head, PAGES
        )
        keys = load_tile(tokens, KEYS, PAGES, BLOCK_DIM)
        values = load_tile(tokens, VALUES, PAGES, BLOCK_DIM)
        nothing = tl.zeros([BLOCK_ROWS, BLOCK_KV], tl.float32)
        scores = add_product(nothing, queries, tl.trans(keys)) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        weights, shrink, peak, total = softmax_step(scores, peak, total)
        sums = add_product(sums * shrink[:, None], weights.to(values.dtype), values)
        done = start + BLOCK_KV
        if (done >= stop) | (done % size == 0):
            place = (sequence.to(tl.int64) * HEADS + head) * chunks + start // size
            tl.store(sums_ptr + place[:, None] * HEAD_DIM + feature[None, :], sums, mask=in_sums)
            tl.store(stats_ptr + place * 2, peak, mask=row < GROUP)
            tl.store(stats_ptr + place * 2 + 1, total, mask=row < GROUP)
            peak = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
