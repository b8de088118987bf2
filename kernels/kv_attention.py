"""Attention over a KV cache of any format and with any selection, in plain torch.

Faster versions inherit what a step is divided into, and replace how rows are stored and read. Pages
are decoded some at a time, with the running softmax of arXiv:2205.14135: no sequence is ever there
in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from polydelta.kernels.kv_eviction import Eviction, evicting
from polydelta.kernels.kv_memory import KVKind, KVMemory, decode_tokens
from polydelta.kernels.kv_notes import label_rows, summarize
from polydelta.kernels.kv_prefill import attended_blocks
from polydelta.kernels.kv_rotation import rotated
from polydelta.kernels.kv_selecting import precise, select
from polydelta.kernels.kv_selection import Window, XAttention
from polydelta.kernels.ops import Kernels, SequenceSlice
from polydelta.kernels.running_softmax import RunningSoftmax
from polydelta.kernels.upload import upload

# Tokens that are decoded and looked at together.
_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class KVRound:
    """Rows that are stored and then read together. Where the format is by page, those of a sequence
    lie in one page, so that whoever reads it behind them finds it encoded."""

    slices: Sequence[SequenceSlice]
    # Of the flat batch, [rows] int64.
    rows: Tensor
    # Where each row goes, [rows] int64: page * block_size + place, or slot * block_size + place
    # where the format is by page.
    places: Tensor
    # Pages that are full when these rows are stored, and the slots of their sequences, [n] int64.
    closing: Tensor
    closing_slots: Tensor


@dataclass(frozen=True, eq=False)
class KVPlan:
    rounds: Sequence[KVRound]
    # Those of which tokens may leave behind the attention.
    evicting: Sequence[SequenceSlice] = ()
    recordable = False


@runtime_checkable
class KVKernels(Kernels, Protocol):
    """Kernels for caches of any format and with any selection."""

    def kv_attention(self, kind: KVKind) -> KVAttention:
        """The fastest that there is."""


class KVAttention:
    """Stores a step's keys and values and lets its queries attend."""

    def __init__(self, kind: KVKind, device: torch.device) -> None:
        self.kind = kind
        self.device = device
        self._eviction = Eviction(kind, device)

    def plan(self, slices: Sequence[SequenceSlice]) -> KVPlan:
        """What each layer needs to know of a step."""
        rounds = [self._round(each) for each in _rounds(self.kind, slices)]
        return KVPlan(rounds, evicting(slices))

    def attend(
        self,
        plan: KVPlan,
        layer: int,
        memory: KVMemory,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """queries: `[tokens, heads, head_dim]`; keys, values: `[tokens, kv_heads, head_dim]` ->
        like the queries; rows without context get zeros."""
        queries, keys = self.rotated(queries), self.rotated(keys)
        out = self.blank(plan, queries)
        for each in plan.rounds:
            self.store(each, memory, keys, values)
            # What is encoded token by token is read as it is stored; a page only behind its end.
            if not self.kind.format.by_page:
                self.close(each, layer, memory)
            self.read(each, layer, memory, queries, out)
            if self.kind.format.by_page:
                self.close(each, layer, memory)
        self.evict(plan, layer, memory, queries)
        return out

    def rotated(self, heads: Tensor) -> Tensor:
        """Queries, or keys, as the format wants them: `[tokens, *, head_dim]` each."""
        return rotated(heads) if self.kind.format.rotates_keys else heads

    def blank(self, plan: KVPlan, queries: Tensor) -> Tensor:  # noqa: ARG002
        """Like the queries: zeros where a row has no context."""
        return torch.zeros_like(queries)

    def store(self, part: KVRound, memory: KVMemory, keys: Tensor, values: Tensor) -> None:
        """Of the round's rows; keys as `rotated` has them."""
        keys, values = (each.index_select(0, part.rows) for each in (keys, values))
        size = self.kind.layout.block_size
        pages, places = part.places // size, part.places % size
        if self.kind.format.by_page:
            assert memory.open is not None
            memory.open[pages, places] = torch.stack((keys, values), 1)
            return
        encoded = self.kind.format.encode(keys[:, None], values[:, None])
        for name, rows in encoded.items():
            self.kind.layout.view(memory.pages, name)[pages, places] = rows[:, 0]

    def close(self, part: KVRound, layer: int, memory: KVMemory) -> None:
        """Encodes the pages that have become full, and notes what selections ask of them and of
        the round's rows."""
        label_rows(self.kind, layer, memory.pages, part.places)
        if not len(part.closing):
            return
        if self.kind.format.by_page:
            self.encode_open(memory, layer, part.closing, part.closing_slots)
        else:
            summarize(self.kind, layer, memory.pages, part.closing)

    def encode_open(self, memory: KVMemory, layer: int, pages: Tensor, slots: Tensor) -> None:
        """What slots have, into pages; both `[n]` int64."""
        assert memory.open is not None
        # [n, block_size, 2, kv_heads, head_dim]
        tokens = memory.open[slots]
        for name, content in self.kind.format.encode(tokens[:, :, 0], tokens[:, :, 1]).items():
            self.kind.layout.view(memory.pages, name)[pages] = content
        summarize(self.kind, layer, memory.pages, pages)

    def evict(self, plan: KVPlan, layer: int, memory: KVMemory, queries: Tensor) -> None:
        """What follows the attention of `KVPlan.evicting`. queries: of the flat batch."""
        for part in plan.evicting:
            rows = queries[part.start : part.start + part.length]
            self._eviction.after(part, layer, memory, rows)

    def forget(self, slot: int) -> None:
        """The slot's sequence has left: drops what was kept for its tokens to leave."""
        self._eviction.forget(slot)

    def read(
        self, part: KVRound, layer: int, memory: KVMemory, queries: Tensor, out: Tensor
    ) -> None:
        """Lets the round's queries attend; out: like the queries."""
        for each in part.slices:
            if each.context:
                rows = slice(each.start, each.start + each.length)
                out[rows] = self._attended(each, layer, memory, queries[rows])

    def _attended(
        self, part: SequenceSlice, layer: int, memory: KVMemory, queries: Tensor
    ) -> Tensor:
        """queries: `[length, heads, head_dim]`, of one slice -> the same shape."""
        shape = self.kind.shape
        if isinstance(part.selection, XAttention) and shape.window is None:
            load = partial(self.load, memory, part)
            return attended_blocks(part.selection, shape, part, queries, load)
        group = shape.num_heads // shape.num_kv_heads
        # [kv_heads, n] of positions; None for all of them.
        chosen = select(self.kind, layer, memory, part, queries)
        positions = torch.arange(part.context - part.length, part.context, device=self.device)
        # [kv_heads, group * length, head_dim]: the heads of a kv head one after the other.
        grouped = precise(queries).unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)
        softmax = RunningSoftmax(grouped)
        for tokens in _some(chosen, part, self.kind):
            tokens = tokens.to(self.device)
            # Both [kv_heads, n, head_dim].
            keys, values = (each.to(grouped.dtype) for each in self.load(memory, part, tokens))
            scores = grouped @ keys.transpose(1, 2) / math.sqrt(shape.head_dim)
            seen = self._seen(part, positions, tokens).repeat(1, group, 1)
            softmax.add(scores, seen, values)
        attended: Tensor = softmax.result().unflatten(1, (group, part.length))
        return attended.permute(2, 0, 1, 3).flatten(1, 2).to(queries.dtype)

    def load(self, memory: KVMemory, part: SequenceSlice, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they are stored. tokens: `[kv_heads, n]` int64, positions -> two of
        `[kv_heads, n, head_dim]` float32."""
        return decode_tokens(self.kind, memory, part, tokens)

    def _seen(self, part: SequenceSlice, positions: Tensor, tokens: Tensor) -> Tensor:
        """Which of the tokens each query sees, `[kv_heads, length, n]` bool."""
        tokens, queries = tokens[:, None], positions[None, :, None]
        seen = tokens <= queries
        if self.kind.shape.window is not None:
            seen = seen & (tokens > queries - self.kind.shape.window)
        match part.selection:
            case Window(sinks, recent):
                seen = seen & ((tokens < sinks) | (tokens > queries - recent))
        return seen

    def _round(self, cut: _Cut) -> KVRound:
        """On the device, in one copy."""
        each = (cut.rows, cut.places, cut.closing, cut.closing_slots)
        together = upload([value for values in each for value in values], self.device)
        return KVRound(cut.slices, *together.split([len(values) for values in each]))


def _some(chosen: Tensor | None, part: SequenceSlice, kind: KVKind) -> Iterator[Tensor]:
    """Positions that the slice's queries may see, `[kv_heads, n]` int64, some at a time."""
    if chosen is None:
        oldest = part.context - part.length
        positions = torch.arange(part.context)
        if kind.shape.window is not None:
            positions = positions[positions > oldest - kind.shape.window]
        match part.selection:
            case Window(sinks, recent):
                positions = positions[(positions < sinks) | (positions > oldest - recent)]
        chosen = positions.expand(kind.shape.num_kv_heads, -1)
    yield from chosen.split(_AT_ONCE, 1)


@dataclass(eq=False)
class _Cut:
    """A round, as it is put together."""

    slices: list[SequenceSlice] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    closing: list[int] = field(default_factory=list)
    closing_slots: list[int] = field(default_factory=list)

    def add(self, part: SequenceSlice, size: int, by_page: bool) -> None:
        """size: tokens of a page."""
        self.slices.append(part)
        self.rows += range(part.start, part.start + part.length)
        for position in range(part.context - part.length, part.context):
            page, place = part.pages[position // size], position % size
            self.places.append((part.slot if by_page else page) * size + place)
            if place == size - 1:
                self.closing.append(page)
                self.closing_slots.append(part.slot)


def _rounds(kind: KVKind, slices: Sequence[SequenceSlice]) -> list[_Cut]:
    size, by_page = kind.layout.block_size, kind.format.by_page
    if not by_page:
        cut = _Cut()
        for part in slices:
            if part.context:
                cut.add(part, size, by_page)
        return [cut]
    cuts: list[_Cut] = []
    # By slot: the first page that the step writes to.
    began: dict[int, int] = {}
    for part in slices:
        if not part.context:
            continue
        for piece in _by_page(part, size):
            block = (piece.context - 1) // size
            number = block - began.setdefault(part.slot, block)
            while number >= len(cuts):
                cuts.append(_Cut())
            cuts[number].add(piece, size, by_page)
    return cuts


def _by_page(part: SequenceSlice, size: int) -> Iterator[SequenceSlice]:
    """The slice in pieces that end where pages do."""
    start, position, stop = part.start, part.context - part.length, part.context
    while position < stop:
        end = min(stop, (position // size + 1) * size)
        yield replace(part, start=start, length=end - position, context=end)
        start, position = start + end - position, end
