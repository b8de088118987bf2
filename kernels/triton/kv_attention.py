"""Attention over a KV cache of any format and with any selection, in Triton.

Pages are read as they are stored, and choices by query are made of what pages note. What is rare
stays torch on the device: what a page's tokens have in common, and selections that no kernel knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from polydelta.kernels.kv_attention import KVAttention, KVPlan, KVRound
from polydelta.kernels.kv_formats.mustafar import Mustafar, centered
from polydelta.kernels.kv_formats.per_token import PerToken
from polydelta.kernels.kv_memory import KVKind, KVMemory
from polydelta.kernels.kv_notes import summarize
from polydelta.kernels.kv_selection import H2O, Full, Selection, SnapKV, Window
from polydelta.kernels.ops import SequenceSlice
from polydelta.kernels.triton import kv_encode, kv_store
from polydelta.kernels.triton.kv_choose import Choice, choose, notes_of
from polydelta.kernels.triton.kv_decode import decode
from polydelta.kernels.triton.kv_pages import Pages, pages_of
from polydelta.kernels.triton.kv_prefill import prefill
from polydelta.kernels.triton.kv_tables import (
    DecodeTable,
    PrefillTable,
    decode_table,
    most_pages,
    prefill_table,
)
from polydelta.kernels.triton.kv_tiles import kv_decode_tiles, kv_prefill_tiles

# What reads ranges of positions; the last two give tokens up afterwards.
_RANGES = (Full, Window, SnapKV, H2O)


@dataclass(frozen=True, eq=False)
class ChoosingPart:
    """Sequences of one token that choose what they read in one way."""

    selection: Selection
    choice: Choice
    # For layers in which everything is read, and for the others.
    dense: DecodeTable
    chosen: DecodeTable
    # Blocks of the sequence that has most.
    width: int


@dataclass(frozen=True, eq=False)
class TritonKVRound(KVRound):
    """A round with what kernels need to know of it."""

    # Of each row of the batch where it goes, [tokens] int64: as `places`, below 0 for nowhere.
    targets: Tensor
    decode: DecodeTable | None
    choosing: Sequence[ChoosingPart]
    prefill: PrefillTable | None
    # What no kernel reads.
    others: Sequence[SequenceSlice]


@dataclass(frozen=True, eq=False)
class TritonKVPlan(KVPlan):
    rounds: Sequence[TritonKVRound] = ()
    # Whether what is launched depends only on how many rows there are.
    recordable: bool = False

    def assume(self, other: TritonKVPlan) -> None:
        """Takes the sequences of another plan for as many rows, both recordable. Raises ValueError
        for a plan that is not such a one."""
        if not (self.recordable and other.recordable):
            raise ValueError("only a plan for as many sequences of one token can take its place")
        (mine,), (theirs,) = self.rounds, other.rounds
        assert mine.decode is not None
        assert theirs.decode is not None
        mine.decode.assume(theirs.decode)
        mine.targets.copy_(theirs.targets)


class TritonKVAttention(KVAttention):
    """Pages must lie on the device: those of InfLLM in host RAM are refused."""

    def __init__(self, kind: KVKind, device: torch.device) -> None:
        labels = None if kind.labels is None else kind.labels.to(device)
        super().__init__(replace(kind, labels=labels), device)
        # By the bytes from one page to the next.
        self._pages = cache(lambda page_bytes: pages_of(kind, page_bytes))
        pages = self._pages(kind.layout.page_bytes)
        self._decode_tiles = kv_decode_tiles(kind.shape, pages, kind.dtype)
        self._prefill_tiles = kv_prefill_tiles(kind.shape, pages, kind.dtype)

    def plan(self, slices: Sequence[SequenceSlice]) -> TritonKVPlan:
        plan, layout = super().plan(slices), self.kind.layout
        rows = max((part.start + part.length for part in slices), default=0)
        # Rows without context get zeros, so that steps of as many rows launch the same.
        padding = [part for part in slices if not part.context and part.length == 1]
        rounds = [
            self._with_tables(each, rows, padding if number == 0 else [])
            for number, each in enumerate(plan.rounds)
        ]
        # When a page is full there is something to do, where it is encoded then, or notes anything.
        noted = self.kind.format.by_page or len(layout.sections) > len(self.kind.stored)
        recordable = not noted and not plan.evicting and all(map(_only_decodes, rounds))
        return TritonKVPlan(rounds, plan.evicting, recordable)

    def store(self, part: KVRound, memory: KVMemory, keys: Tensor, values: Tensor) -> None:
        assert isinstance(part, TritonKVRound)
        if memory.open is None:
            kv_encode.encode(self._pages_in(memory), memory.pages, keys, values, part.targets)
            return
        # As pages of one token.
        tokens = memory.open.flatten(0, 1)[:, :, None]
        kv_store.store_kv(tokens, keys, values, part.targets)

    def encode_open(self, memory: KVMemory, layer: int, pages: Tensor, slots: Tensor) -> None:
        if not isinstance(self.kind.format, PerToken):
            super().encode_open(memory, layer, pages, slots)
            return
        assert memory.open is not None
        # [n, block_size, kv_heads, head_dim]
        keys, values = memory.open[slots].unbind(2)
        if isinstance(self.kind.format, Mustafar):
            means, keys = centered(keys)
            self.kind.layout.view(memory.pages, "key_means")[pages] = means
        size = self.kind.layout.block_size
        places = (pages[:, None] * size + torch.arange(size, device=self.device)).flatten()
        rows = keys.flatten(0, 1), values.flatten(0, 1)
        kv_encode.encode(self._pages_in(memory), memory.pages, *rows, places)
        summarize(self.kind, layer, memory.pages, pages)

    def read(
        self, part: KVRound, layer: int, memory: KVMemory, queries: Tensor, out: Tensor
    ) -> None:
        """Raises ValueError for pages in host RAM, and for queries that are not of the cache's
        dtype."""
        assert isinstance(part, TritonKVRound)
        if memory.host is not None:
            raise ValueError(
                "KV pages in host RAM cannot be read by a GPU: use infllm on a CPU, or another "
                "selection."
            )
        if queries.dtype != self.kind.dtype:
            raise ValueError(f"queries are {queries.dtype}, and the KV cache is {self.kind.dtype}")
        if queries.stride()[1:] != (queries.shape[2], 1):
            queries = queries.contiguous()
        shape, pages = self.kind.shape, self._pages_in(memory)
        where = memory.pages, memory.open
        if part.prefill is not None:
            prefill(shape, pages, part.prefill, *where, queries, out)
        if part.decode is not None:
            decode(shape, pages, part.decode, *where, queries, out)
        for each in part.choosing:
            self._choose(each, layer, pages, where, queries, out)
        if part.others:
            super().read(replace(part, slices=part.others), layer, memory, queries, out)

    def _choose(
        self,
        part: ChoosingPart,
        layer: int,
        pages: Pages,
        where: tuple[Tensor, Tensor | None],
        queries: Tensor,
        out: Tensor,
    ) -> None:
        shape = self.kind.shape
        if shape.window is not None or layer < getattr(part.selection, "dense_layers", 0):
            decode(shape, pages, part.dense, *where, queries, out)
            return
        channels = None if self.kind.labels is None else self.kind.labels[layer]
        lists = choose(
            shape, pages, notes_of(self.kind), part.choice, part.chosen, part.width,
            *where, channels, queries,
        )  # fmt: skip
        decode(shape, pages, part.chosen, *where, queries, out, lists, part.choice.unit)

    def _with_tables(
        self, part: KVRound, rows: int, padding: Sequence[SequenceSlice]
    ) -> TritonKVRound:
        """rows: of the batch."""
        single: list[SequenceSlice] = [*padding]
        longer: list[SequenceSlice] = []
        choosing: dict[Selection, list[SequenceSlice]] = {}
        others: list[SequenceSlice] = []
        for each in part.slices:
            if isinstance(each.selection, _RANGES):
                (single if each.length == 1 else longer).append(each)
            elif Choice.of(self.kind, each.selection) is not None:
                choosing.setdefault(each.selection, []).append(each)
            else:
                others.append(each)
        targets = torch.full((rows,), -1, dtype=torch.int64, device=self.device)
        targets[part.rows] = part.places
        shape, device = self.kind.shape, self.device
        return TritonKVRound(
            part.slices, part.rows, part.places, part.closing, part.closing_slots, targets,
            self._decode_table(single) if single else None,
            [self._choosing(selection, each) for selection, each in choosing.items()],
            prefill_table(shape, longer, self._prefill_tiles, device) if longer else None,
            others,
        )  # fmt: skip

    def _choosing(self, selection: Selection, parts: Sequence[SequenceSlice]) -> ChoosingPart:
        choice = Choice.of(self.kind, selection)
        assert choice is not None
        tokens = [choice.tokens(part.context) for part in parts]
        width = max(choice.blocks(part.context) for part in parts)
        return ChoosingPart(
            selection, choice, self._decode_table(parts), self._decode_table(parts, tokens), width
        )

    def _decode_table(
        self, parts: Sequence[SequenceSlice], listed: Sequence[int] | None = None
    ) -> DecodeTable:
        shape = self.kind.shape
        pages = most_pages(shape, parts)
        return decode_table(shape, parts, self._decode_tiles, pages, self.device, listed)

    def _pages_in(self, memory: KVMemory) -> Pages:
        return self._pages(memory.pages.stride(0))


def _only_decodes(part: TritonKVRound) -> bool:
    return part.decode is not None and not (part.choosing or part.prefill or part.others)
