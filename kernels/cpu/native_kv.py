"""Attention over a KV cache of any format and with any selection in our own C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.kernels.cpu.native import Field, NativePool, Struct
from polydelta.kernels.cpu.native_eviction import NativeEviction
from polydelta.kernels.cpu.native_kv_blocks import prompts_struct
from polydelta.kernels.cpu.native_kv_layout import encodes_rows, layout_struct, takes_notes
from polydelta.kernels.cpu.native_kv_plan import ReadingPlan, Workspace
from polydelta.kernels.kv_attention import KVAttention, KVPlan, KVRound
from polydelta.kernels.kv_memory import KVKind, KVMemory
from polydelta.kernels.kv_rotation import part as part_of
from polydelta.kernels.kv_selection import Quest, XAttention
from polydelta.kernels.ops import SequenceSlice

# `KVLeavings` of no sequence.
NOBODY = Struct((0, None))


@dataclass(frozen=True, eq=False)
class NativeRound(KVRound):
    # `KVStored` and `KVPlan` of the C files; the last one for layers in which Quest reads all.
    stored: Struct
    read: Struct
    read_dense: Struct
    # `KVPrompts`; None where no prompt chooses blocks.
    prompts: Struct | None


@dataclass(frozen=True, eq=False, kw_only=True)
class NativeKVPlan(KVPlan):
    rounds: Sequence[NativeRound]
    # Rows without context.
    idle: Struct
    # By layer, what must be known of h2o's answers; of none, made as layers ask for it.
    leaving: dict[int, Struct]
    recordable: bool

    def assume(self, other: NativeKVPlan) -> None:
        """Takes the content of another plan in the place of its own; both are `recordable`."""
        self.idle.assume(other.idle)
        for mine, its in zip(self.rounds, other.rounds, strict=True):
            mine.stored.assume(its.stored)
            mine.read.assume(its.read)
            mine.read_dense.assume(its.read_dense)
        for layer, leaving in self.leaving.items():
            leaving.assume(other.leaving.get(layer, NOBODY))


class NativeKVAttention(KVAttention):
    """Formats in which tokens of a page depend on one another are encoded by torch."""

    def __init__(self, kind: KVKind, pool: NativePool, threads: int) -> None:
        """kind: one that `native_kv_layout.takes`."""
        super().__init__(kind, torch.device("cpu"))
        self._pool = pool
        self._threads = threads
        self._layout = layout_struct(kind)
        self._encodes = encodes_rows(kind)
        self._takes_notes = takes_notes(kind.layout)
        self._workspace = Workspace()
        self._eviction: NativeEviction = NativeEviction(kind, pool, self._cache)

    def plan(self, slices: Sequence[SequenceSlice]) -> NativeKVPlan:
        """Once for each step: what is kept of tokens that leave counts the step."""
        plan = super().plan(slices)
        rounds = [self._native(each) for each in plan.rounds]
        answers = [part for part in plan.evicting if self._eviction.is_answer(part)]
        others = [part for part in plan.evicting if not self._eviction.is_answer(part)]
        alone = others or any(each.prompts for each in rounds)
        closing = any(len(each.closing) for each in rounds)
        recordable = len(rounds) == 1 and not alone and (self._encodes or not closing)
        return NativeKVPlan(
            rounds=rounds,
            evicting=others,
            idle=_idle(slices),
            leaving=self._eviction.leaving(answers),
            recordable=recordable,
        )

    def blank(self, plan: KVPlan, queries: Tensor) -> Tensor:
        assert isinstance(plan, NativeKVPlan)
        out = self._pool.empty(*queries.shape)
        size = queries.shape[1] * queries.shape[2]
        self._pool.call("clear_rows", out, size, size, plan.idle)
        return out

    def rotated(self, heads: Tensor) -> Tensor:
        if not self.kind.format.rotates_keys:
            return heads
        count, size = heads.shape[1:]
        spread = self._pool.empty(*heads.shape)
        stride = heads.stride(0)
        self._pool.call(
            "spread_heads", spread, heads, stride, len(heads), count, size, part_of(size)
        )
        return spread

    def store(self, part: KVRound, memory: KVMemory, keys: Tensor, values: Tensor) -> None:
        assert isinstance(part, NativeRound)
        strides = keys.stride(0), values.stride(0)
        cache = self._cache(memory)
        self._pool.call("store_tokens", *cache, part.stored, keys, values, *strides)

    def close(self, part: KVRound, layer: int, memory: KVMemory) -> None:
        assert isinstance(part, NativeRound)
        if not self._encodes:
            super().close(part, layer, memory)
            return
        cache = self._cache(memory)
        if self.kind.format.by_page:
            self._pool.call("encode_pages", *cache, part.stored)
        if self._takes_notes:
            self._pool.call("note_tokens", *cache, part.stored, self._labels(layer))

    def read(
        self, part: KVRound, layer: int, memory: KVMemory, queries: Tensor, out: Tensor
    ) -> None:
        assert isinstance(part, NativeRound)
        plan = part.read_dense if layer < Quest.dense_layers else part.read
        cache, rows = self._cache(memory), (out, out.stride(0), queries, queries.stride(0))
        self._pool.call("attend_kv", *cache, plan, *rows, self._labels(layer))
        if part.prompts is not None:
            self._pool.call("attend_blocks", *cache, part.prompts, *rows)

    def evict(self, plan: KVPlan, layer: int, memory: KVMemory, queries: Tensor) -> None:
        assert isinstance(plan, NativeKVPlan)
        super().evict(plan, layer, memory, queries)
        if not self.kind.format.by_page and (plan.leaving or plan.recordable):
            # A recording is replayed for others, of which tokens may leave.
            # Not NOBODY itself, which would be overwritten.
            leaving = plan.leaving.setdefault(layer, Struct((0, None)))
            self._eviction.replace_tokens(leaving, memory, queries)

    def _native(self, part: KVRound) -> NativeRound:
        prompts = [each for each in part.slices if self._chooses_blocks(each)]
        others = [each for each in part.slices if not self._chooses_blocks(each)]
        reading = ReadingPlan(self.kind, others, self._threads)
        closing = (len(part.closing), part.closing, part.closing_slots)
        stored = Struct((len(part.rows), part.rows, part.places, *closing))
        return NativeRound(
            part.slices,
            part.rows,
            part.places,
            part.closing,
            part.closing_slots,
            stored,
            *reading.structs(self._workspace),
            prompts_struct(self.kind, prompts, self._workspace),
        )

    def _chooses_blocks(self, part: SequenceSlice) -> bool:
        return isinstance(part.selection, XAttention) and self.kind.shape.window is None

    def _cache(self, memory: KVMemory) -> tuple[Field, ...]:
        """`KVCache`."""
        pages, host = memory.pages, memory.host
        away = (None, 0) if host is None else (host, host.stride(0))
        return (self._layout, pages, pages.stride(0), len(pages), *away, memory.open)

    def _labels(self, layer: int) -> Tensor | None:
        return None if self.kind.labels is None else self.kind.labels[layer]


def _idle(slices: Sequence[SequenceSlice]) -> Struct:
    """Rows without context."""
    rows: list[int] = []
    for part in slices:
        if not part.context:
            rows += range(part.start, part.start + part.length)
    return Struct((len(rows), torch.tensor(rows, dtype=torch.int64)))
