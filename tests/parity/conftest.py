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

from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.formats.reader import read_adapter
from polydelta.adapters_store.packing import pack
from polydelta.engine.deltas import AdapterSegment, PoolAdapter, StepDeltas, wrap_decoder
from polydelta.engine.models.config import from_hf
from polydelta.engine.models.decoder import Decoder, base_layout
from polydelta.engine.models.weights import Weights
from polydelta.engine.paged_kv import PagedKV, kv_page_bytes
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


class PagedDecoder:
    """Our decoder over a small pool; logits of every token that is fed to it."""

    def __init__(self, model: PreTrainedModel, num_pages: int = 3000) -> None:
        self.config = from_hf(model.config.to_dict())
        kernels = kernels_for(torch.device("cpu"))
        weights = Weights(StateDict(model), torch.float32, lambda done, total: None)
        self.decoder = Decoder(self.config, weights, kernels, 512, torch.float32)
        page_bytes = kv_page_bytes(self.config, BLOCK_SIZE, torch.float32)
        shape = (self.config.num_layers, num_pages, page_bytes)
        self.storage = torch.zeros(shape, dtype=torch.uint8)
        self.deltas = StepDeltas()
        wrap_decoder(self.decoder, self.deltas)
        self.kernels = kernels
        self.cache = PagedKV(self.storage, self.config, BLOCK_SIZE, torch.float32, kernels)
        # The lower pages are handed out in a scrambled order on purpose, the upper as runs.
        self.free_pages = torch.randperm(num_pages // 2).tolist()
        self.free_run = list(range(num_pages // 2, num_pages))
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def load(self, folder: Path, scattered: bool = False) -> PoolAdapter:
        """Reads an adapter from its files into the pool: its pages in one run, or scattered."""
        layout = base_layout(self.config, "reference")
        ref = FolderCatalog([folder.parent]).resolve(folder.name)
        packed = pack(read_adapter(ref, layout), layout, torch.float32)
        count = -(-packed.bytes_per_layer // self.storage.shape[-1])
        if scattered:
            pages = [self.free_pages.pop() for _ in range(count)]
        else:
            pages, self.free_run = self.free_run[:count], self.free_run[count:]
        return PoolAdapter(packed, self.storage, pages, self.kernels)

    @torch.inference_mode()
    def feed(self, *chunks: tuple[int, Sequence[int]] | Chunk) -> list[Tensor]:
        """One step: (sequence id, its next tokens), ... -> logits `[tokens, vocab]` of each."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        slices: list[SequenceSlice] = []
        segments: list[AdapterSegment] = []
        chunks = tuple(c if isinstance(c, Chunk) else Chunk(*c) for c in chunks)
        for sequence, chunk, adapter in chunks:
            table = self.tables.setdefault(sequence, [])
            first = self.lengths.get(sequence, 0)
            places = range(first, first + len(chunk))
            while len(table) * BLOCK_SIZE < places.stop:
                table.append(self.free_pages.pop())
            shares = [(adapter, 1.0)] if isinstance(adapter, PoolAdapter) else adapter or ()
            stop = len(tokens) + len(chunk)
            segments += [AdapterSegment(len(tokens), stop, one, weight) for one, weight in shares]
            slices.append(SequenceSlice(len(tokens), len(chunk), places.stop, list(table)))
            tokens += chunk
            positions += places
            slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in places]
            self.lengths[sequence] = places.stop
        self.deltas.segments = segments
        self.cache.prepare(torch.tensor(slots), slices)
        hidden = self.decoder.hidden_states(
            torch.tensor(tokens), torch.tensor(positions), self.cache
        )
        return list(self.decoder.logits(hidden).split([len(c.tokens) for c in chunks]))


@pytest.fixture
def paged() -> Callable[[PreTrainedModel], PagedDecoder]:
    return PagedDecoder
