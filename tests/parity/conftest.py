"""A decoder driven step by step over pages in any order, for comparison with transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.formats.reader import read_adapter
from polydelta.adapters_store.packing import pack
from polydelta.engine.deltas import AdapterSegment, StepDeltas, wrap_decoder
from polydelta.engine.host_adapter import count_pages
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.base_weights import CheckpointWeights
from polydelta.engine.models.config import from_hf
from polydelta.engine.models.decoder import Decoder, base_layout
from polydelta.engine.models.weights import Weights
from polydelta.engine.paged_kv import PagedKV
from polydelta.engine.pool_adapter import PoolAdapter
from polydelta.engine.prefix_kv import fill_prefix
from polydelta.kernels.ops import SequenceSlice, kernels_for

BLOCK_SIZE = 8


@dataclass(frozen=True)
class StateDict:
    """A transformers model's weights as a tensor source."""

    model: PreTrainedModel

    def names(self) -> Collection[str]:
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        return self.model.state_dict().keys() - tied

    def read(self, name: str) -> Tensor:
        return self.model.state_dict()[name]


class Chunk(NamedTuple):
    """The next tokens of one sequence, and the adapter that computes them, or a weighted sum."""

    sequence: int
    tokens: Sequence[int]
    adapter: PoolAdapter | Sequence[tuple[PoolAdapter, float]] | None = None
    # Index of the sequence's first token that the adapter acts on.
    activation: int = 0


class PagedDecoder:
    """Our decoder over a small pool; logits of every token that is fed to it."""

    def __init__(self, model: PreTrainedModel, num_pages: int = 3000) -> None:
        self.model = model
        self.config = from_hf(model.config.to_dict())
        kernels = kernels_for(torch.device("cpu"), torch.float32)
        weights = Weights(StateDict(model), torch.float32, lambda done, total: None)
        self.decoder = Decoder(self.config, weights, kernels, 512, torch.float32)
        spec = KVSpec.of(self.config, torch.float32, BLOCK_SIZE)
        shape = (self.config.num_layers, num_pages, spec.page_bytes)
        self.storage = torch.zeros(shape, dtype=torch.uint8)
        self.deltas = StepDeltas(kernels)
        wrap_decoder(self.decoder, self.deltas)
        self.kernels = kernels
        self.cache = PagedKV(self.storage, spec, kernels)
        # The lower pages are handed out in a scrambled order on purpose, the upper as runs.
        self.free_pages = torch.randperm(num_pages // 2).tolist()
        self.free_run = list(range(num_pages // 2, num_pages))
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        # Virtual tokens, and the pages of their KV.
        self.prefixes: dict[PoolAdapter | None, tuple[int, list[int]]] = {}

    @property
    def layout(self) -> BaseLayout:
        weights = CheckpointWeights(StateDict(self.model), torch.float32)
        return base_layout(self.config, "reference", weights)

    def load(self, folder: Path, scattered: bool = False) -> PoolAdapter:
        """Reads an adapter from its files into the pool: its pages in one run, or scattered."""
        ref = FolderCatalog([folder.parent]).resolve(folder.name)
        return self.load_adapter(read_adapter(ref, self.layout), scattered)

    def load_adapter(self, adapter: Adapter, scattered: bool = False) -> PoolAdapter:
        packed = pack(adapter, self.layout, torch.float32)
        need = count_pages(packed, self.storage.shape[-1], BLOCK_SIZE)
        if scattered:
            pages = [self.free_pages.pop() for _ in range(need.weights)]
        else:
            pages, self.free_run = self.free_run[: need.weights], self.free_run[need.weights :]
        loaded = PoolAdapter(packed, self.storage, pages, self.kernels)
        if packed.prefix is not None:
            own = [self.free_pages.pop() for _ in range(need.prefix)]
            self.deltas.begin(())
            with torch.inference_mode():
                fill_prefix(packed.prefix, own, 0, self.cache, self.decoder)
            self.prefixes[loaded] = packed.prefix.num_tokens, own
        return loaded

    def begin(self, sequence: int, adapter: PoolAdapter | None) -> None:
        """A new sequence, after the virtual tokens of its adapter."""
        virtual, pages = self.prefixes.get(adapter, (0, []))
        self.tables[sequence], self.lengths[sequence] = list(pages), virtual
        if virtual % BLOCK_SIZE:
            self.tables[sequence][-1] = own = self.free_pages.pop()
            self.storage[:, own] = self.storage[:, pages[-1]]

    @torch.inference_mode()
    def feed(self, *chunks: tuple[int, Sequence[int]] | Chunk) -> list[Tensor]:
        """One step: (sequence id, its next tokens), ... -> logits `[tokens, vocab]` of each."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        slices: list[SequenceSlice] = []
        segments: list[AdapterSegment] = []
        chunks = tuple(c if isinstance(c, Chunk) else Chunk(*c) for c in chunks)
        for sequence, chunk, adapter, activation in chunks:
            if sequence not in self.tables:
                self.begin(sequence, adapter if isinstance(adapter, PoolAdapter) else None)
            table, first = self.tables[sequence], self.lengths[sequence]
            places = range(first, first + len(chunk))
            while len(table) * BLOCK_SIZE < places.stop:
                table.append(self.free_pages.pop())
            shares = [(adapter, 1.0)] if isinstance(adapter, PoolAdapter) else adapter or ()
            stop = len(tokens) + len(chunk)
            begin = min(stop, max(len(tokens), len(tokens) + activation - first))
            segments += [AdapterSegment(begin, stop, one, weight) for one, weight in shares]
            slices.append(SequenceSlice(len(tokens), len(chunk), places.stop, list(table)))
            tokens += chunk
            positions += places
            slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in places]
            self.lengths[sequence] = places.stop
        self.deltas.begin(segments, segments)
        self.cache.prepare(torch.tensor(slots), slices)
        hidden = self.decoder.hidden_states(
            torch.tensor(tokens), torch.tensor(positions), self.cache
        )
        return list(self.decoder.logits(hidden).split([len(c.tokens) for c in chunks]))


@pytest.fixture
def paged() -> Callable[[PreTrainedModel], PagedDecoder]:
    return PagedDecoder
