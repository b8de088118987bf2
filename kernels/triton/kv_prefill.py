"""Prefill attention over pages of any format: runs of tokens, in tiles of rows as in
`attention_prefill`, with windows and sinks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton.attention_prefill import split_rows
from polydelta.kernels.triton.attention_tiles import LOWEST, Tiles, scale, softmax_step
from polydelta.kernels.triton.kv_formats import KEYS, VALUES, find_tokens, load_tile
from polydelta.kernels.triton.kv_pages import Pages
from polydelta.kernels.triton.kv_tables import PrefillTable
from polydelta.kernels.triton.products import add_product


def prefill(
    shape: AttentionShape,
    pages: Pages,
    table: PrefillTable,
    memory: Tensor,
    opened: Tensor | None,
    queries: Tensor,
    out: Tensor,
) -> None:
    """As `kv_decode.decode`."""
    prefill_kernel[(shape.num_kv_heads, table.count)](
        queries, memory, queries if opened is None else opened, table.ints.tensor, out,
        queries.stride(0), scale(shape), **prefill_constants(shape, pages, table.tiles),
        **table.tiles.options,
    )  # fmt: skip


def prefill_constants(shape: AttentionShape, pages: Pages, tiles: Tiles) -> dict[str, object]:
    return {
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "PAGES": pages,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_KV": tiles.kv,
        "BLOCK_DIM": tiles.features,
    }


@triton.jit
def prefill_kernel(
    queries_ptr,
    pages_ptr,
    open_ptr,
    table_ptr,
    out_ptr,
    query_stride,
    scale,
    GROUP: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program: one tile of rows of one kv head."""
    HEAD_DIM: tl.constexpr = PAGES.head_dim
    HEADS: tl.constexpr = GROUP * PAGES.kv_heads
    kv_head = tl.program_id(0)
    header_ptr = table_ptr + tl.program_id(1) * 13
    start = tl.load(header_ptr)
    length = tl.load(header_ptr + 1)
    context = tl.load(header_ptr + 2)
    ids_ptr = table_ptr + tl.load(header_ptr + 3)
    slot = tl.load(header_ptr + 4)
    oldest = tl.load(header_ptr + 5)
    before_gap = tl.load(header_ptr + 6)
    gap = tl.load(header_ptr + 7)
    count = tl.load(header_ptr + 8)
    first_row = tl.load(header_ptr + 9)
    window = tl.load(header_ptr + 10)
    sinks = tl.load(header_ptr + 11)
    recent = tl.load(header_ptr + 12)

    query, head, inside_run = split_rows(first_row, length, kv_head, GROUP, BLOCK_ROWS)
    position = (context - length + query)[:, None]
    feature = tl.arange(0, BLOCK_DIM)
    in_tile = inside_run[:, None] & (feature < HEAD_DIM)[None, :]
    place = (start + query).to(tl.int64) * query_stride + head * HEAD_DIM
    queries = tl.load(queries_ptr + place[:, None] + feature[None, :], mask=in_tile, other=0.0)
    peak = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for first in range(0, count, BLOCK_KV):
        number = first + tl.arange(0, BLOCK_KV)
        inside = number < count
        positions = number + oldest + tl.where(number >= before_gap, gap, 0)
        tokens = find_tokens(
            pages_ptr, open_ptr, ids_ptr, positions, inside, context, slot, kv_head, PAGES
        )
        keys = load_tile(tokens, KEYS, PAGES, BLOCK_DIM)
        values = load_tile(tokens, VALUES, PAGES, BLOCK_DIM)
        nothing = tl.zeros([BLOCK_ROWS, BLOCK_KV], tl.float32)
        scores = add_product(nothing, queries, tl.trans(keys)) * scale
        age = position - positions[None, :]
        visible = (age >= 0) & (age < window) & ((positions < sinks)[None, :] | (age < recent))
        scores = tl.where(visible & inside[None, :], scores, float("-inf"))
        weights, shrink, peak, total = softmax_step(scores, peak, total)
        sums = add_product(sums * shrink[:, None], weights.to(values.dtype), values)

    # No less than 1, the weight of the highest score, but in rows that are not stored.
    mixed = sums / tl.maximum(total, 1.0)[:, None]
    # Loaded and computed again: see `attention_prefill`.
    first_row = tl.load(header_ptr + 9, volatile=True)
    query, head, inside_run = split_rows(first_row, length, kv_head, GROUP, BLOCK_ROWS)
    place = ((start + query).to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(
        out_ptr + place[:, None] + feature[None, :],
        mixed.to(out_ptr.dtype.element_ty),
        mask=inside_run[:, None] & (feature < HEAD_DIM)[None, :],
    )
