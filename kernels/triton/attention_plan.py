"""What attention needs to know of a step, as integers on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polydelta.kernels.ops import AttentionShape, SequenceSlice
from polydelta.kernels.triton.attention_chunks import (
    chunk_capacity,
    cut,
    share_capacity,
    share_out,
)
from polydelta.kernels.triton.attention_decode import SEQUENCE_INTS, SHARE_INTS
from polydelta.kernels.triton.attention_prefill import HEADER_INTS
from polydelta.kernels.triton.attention_tiles import Tiles, decode_tiles, prefill_tiles
from polydelta.kernels.triton.device_ints import StaticInts


@dataclass(frozen=True, eq=False)
class DecodePart:
    """Sequences of one token."""

    tiles: Tiles
    # Sequences, shares, and the most chunks of a sequence.
    sizes: tuple[int, int, int]
    # The shares, the sequences, then page ids.
    table: StaticInts


@dataclass(frozen=True, eq=False)
class PrefillPart:
    """Sequences of several tokens."""

    tiles: Tiles
    # How many tiles there are.
    count: int
    # A header for each tile, then page ids.
    table: StaticInts


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """One-token sequences go one way and all others another, so what a sequence gets does not
    depend on who shares the batch."""

    shape: AttentionShape
    decode: DecodePart | None
    prefill: PrefillPart | None

    @property
    def recordable(self) -> bool:
        """Whether what is launched depends only on how many sequences there are."""
        return self.prefill is None

    def assume(self, other: AttentionPlan) -> None:
        """Takes the sequences of another plan for as many, both recordable and made for the same
        shape and `max_pages`. Raises ValueError for a plan that is not such a one."""
        if self.decode is None or other.decode is None or self.decode.sizes != other.decode.sizes:
            raise ValueError("only a plan for as many sequences of one token can take its place")
        self.decode.table.assume(other.decode.table)


def plan(
    shape: AttentionShape,
    sequences: Sequence[SequenceSlice],
    dtype: torch.dtype,
    device: torch.device,
    max_pages: int,
) -> AttentionPlan:
    """max_pages: of one sequence; plans for the same and as many one-token sequences are
    interchangeable. Raises ValueError for a one-token sequence that has more."""
    single = [sequence for sequence in sequences if sequence.length == 1]
    longer = [sequence for sequence in sequences if sequence.length > 1]
    return AttentionPlan(
        shape,
        _plan_decode(shape, single, dtype, device, max_pages) if single else None,
        _plan_prefill(shape, longer, dtype, device) if longer else None,
    )


def _plan_decode(
    shape: AttentionShape,
    sequences: Sequence[SequenceSlice],
    dtype: torch.dtype,
    device: torch.device,
    max_pages: int,
) -> DecodePart:
    tiles = decode_tiles(shape, dtype)
    for sequence in sequences:
        if sequence.context > max_pages * shape.block_size:
            raise ValueError(f"{sequence.context} tokens do not fit {max_pages} pages")
    most_chunks = chunk_capacity(shape, tiles.kv, max_pages)
    capacity = share_capacity(shape, len(sequences), most_chunks)
    chunks = [cut(sequence.context, shape.window, tiles.kv) for sequence in sequences]
    pages = _Pages(shape, at=capacity * SHARE_INTS + len(sequences) * SEQUENCE_INTS)
    places = [pages.add(sequence) for sequence in sequences]
    values: list[int] = []
    for share in share_out(chunks, capacity):
        s, own = sequences[share.sequence], chunks[share.sequence]
        values += share.sequence, s.start, places[share.sequence], s.context
        values += own.seen, own.size, share.begin, share.end
    values += [0] * (capacity * SHARE_INTS - len(values))
    for s, own in zip(sequences, chunks, strict=True):
        values += s.start, own.count
    values += pages.ids
    room = pages.at + len(sequences) * max_pages
    sizes = len(sequences), capacity, most_chunks
    return DecodePart(tiles, sizes, StaticInts(values, room, device))


def _plan_prefill(
    shape: AttentionShape,
    sequences: Sequence[SequenceSlice],
    dtype: torch.dtype,
    device: torch.device,
) -> PrefillPart:
    tiles = prefill_tiles(shape, dtype)
    group = shape.num_heads // shape.num_kv_heads
    cuts = [
        (sequence, first_row)
        for sequence in sequences
        for first_row in range(0, sequence.length * group, tiles.rows)
    ]
    # Those with the most to see begin first, so that none of them ends long after the others.
    cuts.sort(key=lambda tile: tile[0].context - tile[0].length + tile[1] // group, reverse=True)
    pages = _Pages(shape, at=len(cuts) * HEADER_INTS)
    places = {sequence.start: pages.add(sequence) for sequence in sequences}
    headers: list[int] = []
    for s, first_row in cuts:
        headers += s.start, s.length, s.context, places[s.start], first_row
    values = [*headers, *pages.ids]
    return PrefillPart(tiles, len(cuts), StaticInts(values, len(values), device))


class _Pages:
    """Page ids of several sequences, one after the other; only those that are seen."""

    def __init__(self, shape: AttentionShape, at: int) -> None:
        """at: where in the table they will begin."""
        self.at = at
        self.ids: list[int] = []
        self._shape = shape

    def add(self, sequence: SequenceSlice) -> int:
        """Where in the table the id of the sequence's page 0 is or would be."""
        size, window = self._shape.block_size, self._shape.window
        oldest = sequence.context - sequence.length
        first = 0 if window is None else max(0, oldest + 1 - window) // size
        place = self.at + len(self.ids) - first
        self.ids += sequence.pages[first : -(-sequence.context // size)]
        return place
