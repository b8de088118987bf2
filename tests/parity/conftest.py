"""A decoder driven step by step over pages in any order, for comparison with transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polydelta.engine.models.config import from_hf
from polydelta.engine.models.decoder import Decoder
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


class PagedDecoder:
    """Our decoder over a small pool; logits of every token that is fed to it."""

    def __init__(self, model: PreTrainedModel, num_pages: int = 64) -> None:
        self.config = from_hf(model.config.to_dict())
        kernels = kernels_for(torch.device("cpu"))
        weights = Weights(StateDict(model), torch.float32, lambda done, total: None)
        self.decoder = Decoder(self.config, weights, kernels, 512, torch.float32)
        page_bytes = kv_page_bytes(self.config, BLOCK_SIZE, torch.float32)
        storage = torch.zeros(self.config.num_layers, num_pages, page_bytes, dtype=torch.uint8)
        self.cache = PagedKV(storage, self.config, BLOCK_SIZE, torch.float32, kernels)
        # Pages are handed out in a scrambled order on purpose.
        self.free_pages = torch.randperm(num_pages).tolist()
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    @torch.inference_mode()
    def feed(self, *chunks: tuple[int, Sequence[int]]) -> list[Tensor]:
        """One step: (sequence id, its next tokens), ... -> logits `[tokens, vocab]` of each."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        slices: list[SequenceSlice] = []
        for sequence, chunk in chunks:
            table = self.tables.setdefault(sequence, [])
            first = self.lengths.get(sequence, 0)
            places = range(first, first + len(chunk))
            while len(table) * BLOCK_SIZE < places.stop:
                table.append(self.free_pages.pop())
            slices.append(SequenceSlice(len(tokens), len(chunk), places.stop, list(table)))
            tokens += chunk
            positions += places
            slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in places]
            self.lengths[sequence] = places.stop
        self.cache.prepare(torch.tensor(slots), slices)
        hidden = self.decoder.hidden_states(
            torch.tensor(tokens), torch.tensor(positions), self.cache
        )
        return list(self.decoder.logits(hidden).split([len(chunk) for _, chunk in chunks]))


@pytest.fixture
def paged() -> Callable[[PreTrainedModel], PagedDecoder]:
    return PagedDecoder
