"""Eviction from the KV cache in our own C: the attention that tokens receive, and what each token
of an answer makes leave. What leaves a prompt, once for each, is left to torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polydelta.kernels.cpu.native import Field, NativePool, Struct
from polydelta.kernels.kv_eviction import Eviction
from polydelta.kernels.kv_memory import KVKind, KVMemory
from polydelta.kernels.kv_merging import SIMILARITY
from polydelta.kernels.kv_selection import H2O
from polydelta.kernels.ops import SequenceSlice

# As in the C files: tokens of a tile.
_KEYS = 32
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

    def is_answer(self, part: SequenceSlice) -> bool:
        """Whether it is one token of h2o for which another one leaves."""
        if not isinstance(part.selection, H2O) or part.context == part.length:
            return False
        self._check(part)
        states = self._sequences[part.slot].values()
        return bool(states) and all(state.count for state in states)

    def leaving(self, answers: Sequence[SequenceSlice]) -> dict[int, Struct]:
        """For each layer `KVLeavings` of the C files, for one step. answers: each `is_answer`."""
        fields: dict[int, list[Field]] = defaultdict(list)
        heads = self.kind.shape.num_heads
        for part in answers:
            assert isinstance(part.selection, H2O)
            pages, recent = torch.tensor(part.pages), part.selection.num_recent(part.prompt)
            states = self._sequences[part.slot]
            kept = next(iter(states.values())).received.shape[1]
            # Layers come one after the other.
            scores = torch.empty(heads, -(-(kept + 1) // _KEYS) * _KEYS)
            for layer, state in states.items():
                fields[layer] += (pages, part.start, kept, state.count, state.count - recent + 1)
                fields[layer] += (state.received, state.positions, scores)
                state.count += 1
        return {layer: Struct((len(answers), Struct(each))) for layer, each in fields.items()}

    def replace_tokens(self, leaving: Struct, memory: KVMemory, queries: Tensor) -> None:
        """Lets a token leave for each of a step's answers. leaving: of the layer; queries: of the
        flat batch."""
        shape = self.kind.shape
        self._pool.call(
            "replace_tokens",
            *self._cache(memory),
            shape.num_heads,
            leaving,
            1 / math.sqrt(shape.head_dim),
            SIMILARITY,
            queries,
            queries.stride(0),
        )
