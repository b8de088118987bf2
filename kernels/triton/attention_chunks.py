"""How decode attention cuts contexts into chunks, and which program computes which of them.

What a sequence sees is cut by its own context alone, so its result has the same bits whoever
shares the batch. Who computes a chunk changes nothing, so that is chosen by the load:

    sequence 0       +----+----+----+----+----+--+      sequence 1   +----+--+
    programs         | 0       | 1       | 2     |                   | 3     |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polydelta.kernels.ops import AttentionShape

# The most chunks of a sequence: with 8 kv heads a single sequence then has about two programs for
# each of 132 multiprocessors.
MAX_CHUNKS = 32
# Tokens of the shortest chunk: a multiple of every tile's.
MIN_CHUNK = 256
# Programs beside the first of each sequence: three times what 132 multiprocessors hold, two each.
# One with nothing to do costs about as much as the loading of its header.
SPARE_PROGRAMS = 792


@dataclass(frozen=True)
class Chunks:
    """What one token sees, in chunks that are whole tiles but for the last."""

    # The first token that is seen; chunk 0 begins at the border of a tile before or at it.
    seen: int
    # Tokens of a chunk.
    size: int
    count: int


@dataclass(frozen=True)
class Share:
    """One program's chunks for each kv head: begin : end of a sequence."""

    sequence: int
    begin: int
    end: int


def cut(context: int, window: int | None, tile: int) -> Chunks:
    """tile: tokens of KV that are computed at once."""
    seen = 0 if window is None else max(0, context - window)
    tokens = context - seen // tile * tile
    size = max(MIN_CHUNK, -(-tokens // (MAX_CHUNKS * tile)) * tile)
    return Chunks(seen, size, -(-tokens // size))


def chunk_capacity(shape: AttentionShape, tile: int, max_pages: int) -> int:
    """The most chunks that a sequence of so many pages can have."""
    tokens = max_pages * shape.block_size
    if shape.window is not None:
        tokens = min(tokens, shape.window + tile)
    return max(1, min(MAX_CHUNKS, -(-tokens // MIN_CHUNK)))


def share_capacity(shape: AttentionShape, sequences: int, chunks: int) -> int:
    """How many shares there are room for; chunks: what `chunk_capacity` says."""
    return min(sequences * chunks, sequences + SPARE_PROGRAMS // shape.num_kv_heads)


def share_out(sequences: Sequence[Chunks], capacity: int) -> list[Share]:
    """The longest first. A sequence has one program, and of those to spare its part by length."""
    spare = capacity - len(sequences)
    total = max(1, sum(each.size * each.count for each in sequences))
    shares = []
    for index, each in enumerate(sequences):
        programs = min(each.count, 1 + each.size * each.count * spare // total)
        for number in range(programs):
            begin = number * each.count // programs
            shares.append(Share(index, begin, (number + 1) * each.count // programs))
    shares.sort(key=lambda s: (s.end - s.begin) * sequences[s.sequence].size, reverse=True)
    return shares
