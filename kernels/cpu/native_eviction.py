"""Eviction from the KV cache in our own C: the attention that tokens receive, and what each token
of an answer makes leave. What leaves a prompt, once for each, is left to torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from polydelta.kernels.cpu.native import Field, NativePool
from polydelta.kernels.kv_eviction import Eviction, SequenceState
from polydelta.kernels.kv_memory import KVKind, KVMemory
from polydelta.kernels.kv_merging import SIMILARITY
from polydelta.kernels.kv_selection import H2O
from polydelta.kernels.ops import SequenceSlice

# A layer's memory as `KVCache` of the C files.
Cache = Callable[[KVMemory], tuple[Field, ...]]


class NativeEviction(Eviction):
    def __init__(self, kind: KVKind, pool: NativePool, cache: Cache) -> None:
        """kind: one that `native_kv_layout.takes`."""
        super().__init__(kind, torch.device("cpu"))
        self._pool = pool
        self._cache = cache

    def received(self, part: SequenceSlice, memory: KVMemory, queries: Tensor) -> Tensor:
        shape, rows = self.kind.shape, len(queries)
        shares = torch.empty(shape.num_kv_heads, part.context, dtype=torch.float64)
        self._pool.call(
            "note_attention",
            *self._cache(memory),
            shape.num_heads,
            rows,
            part.context,
            part.slot,
            torch.tensor(part.pages),
            1 / math.sqrt(shape.head_dim),
            queries,
            queries.stride(0),
            torch.empty(2 * rows * shape.num_heads),
            shares,
        )
        return shares

    def replace(
        self,
        selection: H2O,
        sequence: SequenceState,
        part: SequenceSlice,
        memory: KVMemory,
        queries: Tensor,
    ) -> None:
        self._pool.call(
            "replace_token",
            *self._cache(memory),
            torch.tensor(part.pages),
            sequence.received.shape[1],
            sequence.count,
            sequence.count - selection.num_recent(part.prompt) + 1,
            SIMILARITY,
            self.received(part, memory, queries),
            sequence.received,
            sequence.positions,
        )
        sequence.count += 1
