"""What attention over a KV cache of any format needs to know of a step, as integers on the device.

What a query sees is at most two ranges of positions, sinks and what is recent. They are numbered
one after the other, so that kernels go over them without a gap:

    positions   0 . . . . [first sinks) . . . . [ newest )
    numbers               0 1 2 3 4 5            6 7 8 9      position = number + first, + gap
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from polydelta.kernels.kv_selection import Window
from polydelta.kernels.ops import AttentionShape, SequenceSlice
from polydelta.kernels.triton.attention_chunks import (
    chunk_capacity,
    cut,
    share_capacity,
    share_out,
)
from polydelta.kernels.triton.attention_decode import SEQUENCE_INTS
from polydelta.kernels.triton.attention_tiles import Tiles
from polydelta.kernels.triton.device_ints import StaticInts

# Of a share: sequence, row of the batch, where in the table its page ids begin, context, slot, what
# `Seen` says, tokens of a chunk, first chunk, end of the chunks. After all shares come
# SEQUENCE_INTS of each sequence, then ASK_INTS of each: row of the batch, where its page ids begin,
# context, slot. And then page ids.
SHARE_INTS = 12
ASK_INTS = 4
# Of a tile of rows: its sequence's first row in the batch, length, context, where its page ids
# begin, slot, what `Seen` says, the tile's first row among the sequence's, and the window, sinks
# and recent tokens that each query by itself is held to. Then come page ids.
HEADER_INTS = 13
# A window that is none.
ENDLESS = 1 << 30


@dataclass(frozen=True)
class Seen:
    """Positions that some queries see together, as numbers from 0 on."""

    first: int
    # Numbers before the gap, and how many positions that is wide.
    sinks: int
    gap: int
    count: int


@dataclass(frozen=True)
class Limits:
    """What one query sees of what came before it: the newest of `window` tokens that are among the
    first `sinks` or the newest `recent`."""

    window: int
    sinks: int
    recent: int

    @classmethod
    def of(cls, shape: AttentionShape, part: SequenceSlice) -> Limits:
        window = ENDLESS if shape.window is None else shape.window
        match part.selection:
            case Window(sinks, recent):
                return cls(window, min(sinks, part.context), min(recent, ENDLESS))
        return cls(window, 0, ENDLESS)

    def seen(self, oldest: int, newest: int) -> Seen:
        """By queries at positions oldest to newest."""
        first = max(0, oldest + 1 - self.window)
        recent = max(first, oldest + 1 - self.recent)
        sinks = max(0, min(self.sinks, recent) - first)
        gap = recent - first - sinks
        return Seen(first, sinks, gap, newest + 1 - first - gap)


@dataclass(frozen=True, eq=False)
class DecodeTable:
    """Sequences of one token."""

    tiles: Tiles
    # Sequences, shares, and the most chunks of a sequence.
    sizes: tuple[int, int, int]
    ints: StaticInts

    @property
    def asks_at(self) -> int:
        """Where ASK_INTS of each sequence begin."""
        sequences, shares, _ = self.sizes
        return shares * SHARE_INTS + sequences * SEQUENCE_INTS

    def assume(self, other: DecodeTable) -> None:
        """Raises ValueError for another's sizes."""
        if self.sizes != other.sizes:
            raise ValueError("only a plan for as many sequences of one token can take its place")
        self.ints.assume(other.ints)


@dataclass(frozen=True, eq=False)
class PrefillTable:
    """Sequences of several tokens, by tiles of their rows."""

    tiles: Tiles
    # How many tiles there are.
    count: int
    ints: StaticInts


def decode_table(
    shape: AttentionShape,
    parts: Sequence[SequenceSlice],
    tiles: Tiles,
    max_pages: int,
    device: torch.device,
    listed: Sequence[int] | None = None,
) -> DecodeTable:
    """max_pages: of one sequence. listed: of each, how many tokens a list has that names those it
    reads; None where there are no lists. Raises ValueError for a sequence of more pages."""
    for part in parts:
        if part.context > max_pages * shape.block_size:
            raise ValueError(f"{part.context} tokens do not fit {max_pages} pages")
    seen = [Limits.of(shape, part).seen(part.context - 1, part.context - 1) for part in parts]
    if listed is not None:
        # What a list names may still lie outside of the window: before `first`.
        seen = [Seen(one.first, 0, 0, count) for one, count in zip(seen, listed, strict=True)]
    chunks = [cut(one.count, None, tiles.kv) for one in seen]
    most_chunks = chunk_capacity(_without_window(shape), tiles.kv, max_pages)
    capacity = share_capacity(shape, len(parts), most_chunks)
    each = SEQUENCE_INTS + ASK_INTS
    pages = _PageIds(shape.block_size, capacity * SHARE_INTS + len(parts) * each)
    places = [pages.add(part) for part in parts]
    values: list[int] = []
    for share in share_out(chunks, capacity):
        part, own = parts[share.sequence], seen[share.sequence]
        values += share.sequence, part.start, places[share.sequence], part.context
        values += max(0, part.slot), own.first, own.sinks, own.gap, own.count
        values += chunks[share.sequence].size, share.begin, share.end
    values += [0] * (capacity * SHARE_INTS - len(values))
    for part, cuts in zip(parts, chunks, strict=True):
        values += part.start, cuts.count
    for part, place in zip(parts, places, strict=True):
        values += part.start, place, part.context, max(0, part.slot)
    values += pages.ids
    room = pages.at + len(parts) * max_pages
    return DecodeTable(tiles, (len(parts), capacity, most_chunks), StaticInts(values, room, device))


def prefill_table(
    shape: AttentionShape, parts: Sequence[SequenceSlice], tiles: Tiles, device: torch.device
) -> PrefillTable:
    group = shape.num_heads // shape.num_kv_heads
    cuts = [
        (part, first_row)
        for part in parts
        for first_row in range(0, part.length * group, tiles.rows)
    ]
    # Those with the most to see begin first, so that none of them ends long after the others.
    cuts.sort(key=lambda tile: tile[0].context - tile[0].length + tile[1] // group, reverse=True)
    pages = _PageIds(shape.block_size, len(cuts) * HEADER_INTS)
    places = {part.start: pages.add(part) for part in parts}
    headers: list[int] = []
    for part, first_row in cuts:
        limits, position = Limits.of(shape, part), part.context - part.length
        last = min((first_row + tiles.rows - 1) // group, part.length - 1)
        own = limits.seen(position + first_row // group, position + last)
        headers += part.start, part.length, part.context, places[part.start], max(0, part.slot)
        headers += own.first, own.sinks, own.gap, own.count, first_row
        headers += limits.window, limits.sinks, limits.recent
    values = [*headers, *pages.ids]
    return PrefillTable(tiles, len(cuts), StaticInts(values, len(values), device))


def most_pages(shape: AttentionShape, parts: Iterable[SequenceSlice]) -> int:
    """Of one sequence, where nobody says."""
    if shape.max_pages is not None:
        return shape.max_pages
    return max((len(part.pages) for part in parts), default=1)


def _without_window(shape: AttentionShape) -> AttentionShape:
    """For as many chunks as a sequence without a window has: not all windows are the shape's."""
    return AttentionShape(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size)


class _PageIds:
    """Of several sequences, one after the other."""

    def __init__(self, size: int, at: int) -> None:
        """size: tokens of a page; at: where in the table they will begin."""
        self.at = at
        self.ids: list[int] = []
        self._size = size

    def add(self, part: SequenceSlice) -> int:
        """Where in the table the sequence's begin."""
        place = self.at + len(self.ids)
        self.ids += part.pages[: -(-part.context // self._size)]
        return place
