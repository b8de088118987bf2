"""Which tokens are in which chunk, and who computes them."""

from __future__ import annotations

import random

import pytest

from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton.attention_chunks import (
    MAX_CHUNKS,
    MIN_CHUNK,
    Chunks,
    chunk_capacity,
    cut,
    share_capacity,
    share_out,
)


@pytest.mark.parametrize("tile", [16, 32, 64])
@pytest.mark.parametrize("window", [None, 1, 300, 4096])
@pytest.mark.parametrize("context", [0, 1, 255, 256, 257, 4161, 8192, 8193, 131072])
def test_chunks_cover_what_is_seen_and_no_more(context: int, window: int | None, tile: int) -> None:
    chunks = cut(context, window, tile)
    assert chunks.seen == (0 if window is None else max(0, context - window))
    assert chunks.size >= MIN_CHUNK
    assert chunks.size % tile == 0
    first = chunks.seen // tile * tile
    assert first + chunks.size * chunks.count >= context
    assert context == 0 or first + chunks.size * (chunks.count - 1) < context
    shape = AttentionShape(8, 2, 64, block_size=16, window=window)
    assert chunks.count <= chunk_capacity(shape, tile, -(-context // 16)) <= MAX_CHUNKS


def shares_of(contexts: list[int], kv_heads: int) -> tuple[list[Chunks], list[int]]:
    """Chunks of the sequences, and the tokens of each share, which are checked."""
    shape = AttentionShape(4 * kv_heads, kv_heads, 128, block_size=16)
    chunks = [cut(context, None, 64) for context in contexts]
    most = chunk_capacity(shape, 64, 8192)
    capacity = share_capacity(shape, len(contexts), most)
    shares = share_out(chunks, capacity)
    assert len(shares) <= capacity
    computed = sorted((s.sequence, chunk) for s in shares for chunk in range(s.begin, s.end))
    assert computed == [(i, chunk) for i, each in enumerate(chunks) for chunk in range(each.count)]
    assert all(share.begin < share.end for share in shares)
    return chunks, [(share.end - share.begin) * chunks[share.sequence].size for share in shares]


@pytest.mark.parametrize("seed", range(5))
def test_every_chunk_is_computed_once_and_the_longest_shares_begin(seed: int) -> None:
    chance = random.Random(seed)
    contexts = [chance.choice([0, 1, 300, 9000, 131072]) for _ in range(chance.randint(1, 90))]
    _, tokens = shares_of(contexts, chance.choice([1, 8, 32]))
    assert tokens == sorted(tokens, reverse=True)


def test_a_single_sequence_has_a_program_for_each_chunk() -> None:
    chunks, tokens = shares_of([8192], 8)
    assert len(tokens) == chunks[0].count == MAX_CHUNKS


def test_one_long_sequence_among_short_ones_is_not_left_to_few_programs() -> None:
    _, tokens = shares_of([131072] + [1000] * 63, 8)
    assert max(tokens) == 131072 // MAX_CHUNKS


def test_many_equal_sequences_have_equally_many_programs() -> None:
    _, tokens = shares_of([8192] * 64, 8)
    assert tokens == [4096] * 128


def test_sequences_without_context_have_no_program() -> None:
    assert share_out([cut(0, None, 64), cut(0, 10, 64)], 5) == []
