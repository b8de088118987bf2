"""What queries choose to read, by what pages note of their keys: scores by one kernel, how they
rank for a kv head by another, the best of them by torch.

The choices are those of `polydelta.kernels.kv_selecting`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.kv_selection import DoubleSparsity, Quest, Selection
from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton.attention_tiles import LOWEST, scale
from polydelta.kernels.triton.kv_formats import find_tokens, section
from polydelta.kernels.triton.kv_pages import Pages
from polydelta.kernels.triton.kv_tables import DecodeTable
from polydelta.kernels.triton.products import add_product

# Of the integers that say how good a choice is: those that are always taken, and those that are not
# there.
ALWAYS = tl.constexpr(0x7FFFFFFF)
NEVER = tl.constexpr(-0x80000000)
# Of a query's channel, what the bound that gives most and the other one are multiplied with.
TOWARD = tl.constexpr((1 + Quest.reach) / 2)
AWAY = tl.constexpr((1 - Quest.reach) / 2)
# Pages or tokens that a program scores.
BLOCK = 64
# Scores that a program ranks at a time.
_RANKED = 2048


@dataclass(frozen=True)
class Notes:
    """A constant of kernels: what pages note, one of two."""

    # Where labels begin in a page, and how many each token has; 0 where pages have bounds.
    labels_at: int
    labels: int
    least_at: int
    most_at: int


def notes_of(kind: KVKind) -> Notes:
    layout = kind.layout
    if layout.has("labels"):
        return Notes(layout.offset("labels"), layout.section("labels").shape[-1], 0, 0)
    return Notes(0, 0, layout.offset("key_least"), layout.offset("key_most"))


@dataclass(frozen=True)
class Choice:
    """How many of a sequence's blocks of `unit` tokens are read: pages, or tokens."""

    unit: int
    most: int

    @classmethod
    def of(cls, kind: KVKind, selection: Selection) -> Choice | None:
        """None for a selection that chooses otherwise, or not at all."""
        size = kind.layout.block_size
        match selection:
            case Quest() as quest if kind.layout.has("key_least"):
                return cls(size, quest.num_pages(size))
            case DoubleSparsity(budget) if kind.layout.has("labels"):
                return cls(1, budget)
        return None

    def blocks(self, context: int) -> int:
        """That a sequence has."""
        return -(-context // self.unit)

    def tokens(self, context: int) -> int:
        """That are read: the last block is read up to the query."""
        blocks = self.blocks(context)
        return context - (blocks - min(blocks, self.most)) * self.unit


def choose(
    shape: AttentionShape,
    pages: Pages,
    notes: Notes,
    choice: Choice,
    table: DecodeTable,
    width: int,
    memory: Tensor,
    opened: Tensor | None,
    channels: Tensor | None,
    queries: Tensor,
) -> Tensor:
    """width: blocks of the sequence that has most; channels: those that are labels, `[kv_heads,
    labels]` int64 -> `[sequences, kv_heads, n]` int32, blocks in ascending order; beyond those that
    a sequence has, anything."""
    sequences, _, _ = table.sizes
    scores = queries.new_empty(sequences, shape.num_heads, width, dtype=torch.float32)
    ranks = queries.new_empty(sequences, shape.num_kv_heads, width, dtype=torch.int64)
    grid = (shape.num_kv_heads, sequences, triton.cdiv(width, BLOCK))
    score_kernel[grid](
        queries, memory, queries if opened is None else opened,
        table.ints.tensor if channels is None else channels, table.ints.tensor, scores,
        queries.stride(0), table.asks_at, width, **choose_constants(shape, pages, notes),
        num_warps=4,
    )  # fmt: skip
    rank_kernel[grid[:2]](
        scores, ranks, table.ints.tensor, table.asks_at, width, scale(shape),
        **rank_constants(shape, pages, notes), num_warps=4,
    )  # fmt: skip
    # All different, so that nobody's way to look for the best makes a difference.
    best = ranks.topk(min(choice.most, width), sorted=False).values
    return (0xFFFFFFFF - (best & 0xFFFFFFFF)).int().sort().values


def choose_constants(shape: AttentionShape, pages: Pages, notes: Notes) -> dict[str, object]:
    group = shape.num_heads // shape.num_kv_heads
    return {
        "GROUP": group,
        "PAGES": pages,
        "NOTES": notes,
        "BLOCK_ROWS": max(16, triton.next_power_of_2(group)),
        "BLOCK": BLOCK,
        "BLOCK_DIM": max(16, triton.next_power_of_2(notes.labels or shape.head_dim)),
    }


def rank_constants(shape: AttentionShape, pages: Pages, notes: Notes) -> dict[str, object]:
    group = shape.num_heads // shape.num_kv_heads
    rows = triton.next_power_of_2(group)
    return {
        "GROUP": group,
        "PAGES": pages,
        "NOTES": notes,
        "BLOCK_ROWS": rows,
        "BLOCK": max(16, _RANKED // rows),
    }


# Both numbers change from step to step.
@triton.jit(do_not_specialize=["asks_at", "width"])
def score_kernel(
    queries_ptr,
    pages_ptr,
    open_ptr,
    channels_ptr,
    table_ptr,
    scores_ptr,
    query_stride,
    asks_at,
    width,
    GROUP: tl.constexpr,
    PAGES: tl.constexpr,
    NOTES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program: some pages or tokens of one sequence, for the query heads of one kv head.

    scores: `[sequences, heads, width]` float32, anything for those that are always read, or never.
    """
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    ask_ptr = table_ptr + asks_at + sequence * 4
    token = tl.load(ask_ptr).to(tl.int64)
    ids_ptr = table_ptr + tl.load(ask_ptr + 1)
    context = tl.load(ask_ptr + 2)
    slot = tl.load(ask_ptr + 3)
    block = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK_ROWS)
    feature = tl.arange(0, BLOCK_DIM)
    query_ptr = (
        queries_ptr + token * query_stride + (kv_head * GROUP + row)[:, None] * PAGES.head_dim
    )
    scores = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    if NOTES.labels > 0:
        blocks = context
        tokens = find_tokens(
            pages_ptr, open_ptr, ids_ptr, block, block < blocks - 1, context, slot, kv_head, PAGES
        )
        own = feature < NOTES.labels
        channel = tl.load(channels_ptr + kv_head * NOTES.labels + feature, mask=own, other=0)
        asked = tl.load(
            query_ptr + channel[None, :], mask=(row < GROUP)[:, None] & own[None, :], other=0.0
        )
        at = (tokens.places * PAGES.kv_heads + kv_head) * NOTES.labels
        at = section(tokens, NOTES.labels_at, asked.dtype)[:, None] + (
            at[:, None] + feature[None, :]
        )
        labels = tl.load(at, mask=tokens.encoded[:, None] & own[None, :], other=0.0)
        if PAGES.by_page:
            place = (tokens.places * 2 * PAGES.kv_heads + kv_head) * PAGES.head_dim
            at = tokens.open_ptr + (place[:, None] + channel[None, :])
            opened = tl.load(at, mask=tokens.opened[:, None] & own[None, :], other=0.0)
            labels = tl.where(tokens.opened[:, None], opened, labels)
        scores = add_product(scores, asked, tl.trans(labels))
    else:
        blocks = tl.cdiv(context, PAGES.size)
        own = feature < PAGES.head_dim
        asked = tl.load(
            query_ptr + feature[None, :], mask=(row < GROUP)[:, None] & own[None, :], other=0.0
        )
        closed = (block > 0) & (block < blocks - 1)
        ids = tl.load(ids_ptr + block, mask=closed, other=0).to(tl.int64)
        pages = pages_ptr + ids * PAGES.page_bytes
        at = kv_head * PAGES.head_dim + feature
        mask = closed[:, None] & own[None, :]
        least_ptr = (pages + NOTES.least_at).to(tl.pointer_type(asked.dtype))
        most_ptr = (pages + NOTES.most_at).to(tl.pointer_type(asked.dtype))
        least = tl.load(least_ptr[:, None] + at[None, :], mask=mask, other=0.0)
        most = tl.load(most_ptr[:, None] + at[None, :], mask=mask, other=0.0)
        # Between the middle and the bound that gives most, as `kv_selecting.bound_weights`.
        wide = asked.to(tl.float32)
        toward, away = (wide * TOWARD).to(asked.dtype), (wide * AWAY).to(asked.dtype)
        scores = add_product(scores, tl.where(wide < 0, away, toward), tl.trans(most))
        scores = add_product(scores, tl.where(wide < 0, toward, away), tl.trans(least))
    head = (sequence.to(tl.int64) * PAGES.kv_heads + kv_head) * GROUP + row
    to = scores_ptr + head[:, None] * width + block[None, :]
    tl.store(to, scores, mask=(row < GROUP)[:, None] & (block < width)[None, :])


@triton.jit(do_not_specialize=["asks_at", "width"])
def rank_kernel(
    scores_ptr,
    ranks_ptr,
    table_ptr,
    asks_at,
    width,
    scale,
    GROUP: tl.constexpr,
    PAGES: tl.constexpr,
    NOTES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: one sequence and kv head.

    scores: as `score_kernel` leaves them; scale: of them, as exponents of 2. ranks: `[sequences,
    kv_heads, width]` int64, the higher the better: the largest share that a query head would give
    of its attention, and of equal ones how early the block comes.
    """
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    context = tl.load(table_ptr + asks_at + sequence * 4 + 2)
    if NOTES.labels > 0:
        first, blocks = 0, context
    else:
        first, blocks = 1, tl.cdiv(context, PAGES.size)
    row = tl.arange(0, BLOCK_ROWS)
    kv_row = sequence.to(tl.int64) * PAGES.kv_heads + kv_head
    from_ptr = scores_ptr + ((kv_row * GROUP + row) * width)[:, None]
    highest = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = (row < GROUP)[:, None] & ((block >= first) & (block < blocks - 1))[None, :]
        scores = tl.load(from_ptr + block[None, :], mask=inside, other=0.0) * scale
        scores = tl.where(inside, scores, LOWEST)
        top = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.where(inside, tl.exp2(scores - top[:, None]), 0.0)
        total = total * tl.exp2(highest - top) + tl.sum(shares, 1)
        highest = top
    # The highest score's own exponential is 1.
    total = highest + tl.log2(tl.maximum(total, 1.0))
    for start in range(0, width, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = (row < GROUP)[:, None] & ((block >= first) & (block < blocks - 1))[None, :]
        scores = tl.load(from_ptr + block[None, :], mask=inside, other=0.0) * scale
        share = tl.max(tl.where(inside, scores - total[:, None], float("-inf")), 0)
        # As integers that are in the order of the shares; 0 is no more than -0.
        bits = (share + 0.0).to(tl.int32, bitcast=True)
        rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        rank = tl.where((block < first) | (block == blocks - 1), ALWAYS, rank)
        rank = tl.where(block < blocks, rank, NEVER)
        earlier = 0xFFFFFFFF - block.to(tl.int64)
        to = ranks_ptr + kv_row * width + block
        tl.store(to, (rank.to(tl.int64) << 32) | earlier, mask=block < width)
