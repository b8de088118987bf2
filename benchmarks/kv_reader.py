"""A model that reads a given text, prompt and answer, over a KV cache of any format and selection.

The answer's tokens are given, and computed in one pass where nothing is evicted: each of them reads
what it would read in serving, as the same rules and block tables say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.formats.reader import read_adapter
from polydelta.adapters_store.packing import pack
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.batch import build_batch
from polydelta.engine.deltas import AdapterSegment, StepDeltas, wrap_decoder
from polydelta.engine.eviction import CostModel
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.base_weights import checkpoint_layout
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.weights import Weights
from polydelta.engine.paged_kv import PagedKV
from polydelta.engine.pool import PagePool
from polydelta.engine.pool_adapter import PoolAdapter
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.sequence import ScheduledSequence, Sequence as TokenSequence
from polydelta.kernels.kv_selection import XAttention, parse_prefill, parse_selection
from polydelta.kernels.ops import Kernels

# Tokens of a step; logits are computed for so many of them at once.
STEP = 512


@dataclass(frozen=True)
class Way:
    """How KV is stored and read."""

    format: str = "native"
    selection: str = "full"
    prefill: str = "full"

    @property
    def name(self) -> str:
        parts = (self.format, self.selection, self.prefill)
        return ", ".join(part for part in parts if part not in ("native", "full")) or "native"


class Model:
    """The decoder, and an adapter that may act on all of its rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        dtype: torch.dtype,
        max_tokens: int,
        adapter: Path | None = None,
    ) -> None:
        """adapter: its folder."""
        self.config = checkpoint.config
        self.kernels = kernels
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.layout = checkpoint_layout(checkpoint, dtype)
        weights = Weights(checkpoint.tensors, dtype, lambda *_: None)
        self.decoder = Decoder(checkpoint.config, weights, kernels, max_tokens, dtype)
        self.deltas = StepDeltas(kernels)
        wrap_decoder(self.decoder, self.deltas)
        self._ref = None if adapter is None else AdapterRef(adapter.name, 1, adapter)
        self._bound = None if self._ref is None else self._bind(self._ref)

    def segments(self, rows: int) -> list[AdapterSegment]:
        return [] if self._bound is None else [AdapterSegment(0, rows, self._bound)]

    @property
    def shares(self) -> tuple[Share, ...]:
        return () if self._ref is None else (Share(self._ref),)

    def _bind(self, ref: AdapterRef) -> PoolAdapter:
        packed = pack(read_adapter(ref, self.layout), self.layout, self.dtype)
        storage = self.kernels.zeros(len(packed.layers), 1, packed.bytes_per_layer)
        return PoolAdapter(packed, storage, [0], self.kernels)


class Reader:
    """Reads one text after another; for one thread."""

    def __init__(
        self, model: Model, way: Way, labels: Tensor | None = None, block_size: int | None = None
    ) -> None:
        """labels: for double-sparsity; block_size: native tokens of a page; both as in `KVSpec`."""
        self._model = model
        selection, prefill = parse_selection(way.selection), parse_prefill(way.prefill)
        config, kernels = model.config, model.kernels
        self.spec = KVSpec.of(config, model.dtype, block_size, way.format, selection, labels)
        of_prompts = prefill if isinstance(prefill, XAttention) else None
        self._rules = KVRules(selection, of_prompts, way.format, self.spec.format.by_page)
        # With room for what is evicted only when a step is done.
        self._num_pages = -(-model.max_tokens // self.spec.block_size) + 2
        storage = kernels.zeros(config.num_layers, self._num_pages, self.spec.page_bytes)
        self._kv = PagedKV(storage, self.spec, kernels, model.max_tokens)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], prompt: int, take: Callable[[int, Tensor], None]) -> None:
        """prompt: how many of the tokens are one. take: given the place of a token and the logits
        `[n, vocab]` float32 behind it and those that follow it, for the prompt's last token and all
        after it but the last."""
        params = SamplingParams(max_tokens=len(tokens) - prompt + 1)
        request = GenerationRequest("text", tokens[:prompt], params, self._model.shares)
        sequence = TokenSequence(request, lambda _: None)
        sequence.knows_traits = True
        books = KVCache(
            PagePool(self._num_pages), self.spec.block_size, CostModel(), False, rules=self._rules
        )
        books.admit(sequence, [])
        # The answer is known, so its tokens are rows like the prompt's.
        sequence.token_ids = list(tokens[:-1])
        while (done := sequence.num_computed) < len(sequence.token_ids):
            count = self._rules.next_chunk(sequence, min(STEP, len(sequence.token_ids) - done))
            books.grow(sequence, done + count)
            self._step(ScheduledSequence(sequence, count), max(0, prompt - 1 - done), take)
            sequence.num_computed += count
            books.drop_evicted(sequence)
            if books.leaves_pages(sequence):
                books.leave_pages(sequence)

    def _step(
        self, item: ScheduledSequence, first: int, take: Callable[[int, Tensor], None]
    ) -> None:
        """first: of its rows, the first whose logits are wanted."""
        model, size = self._model, self.spec.block_size
        batch = build_batch([item], size, model.kernels.device, self._rules)
        self._kv.prepare(batch.slots, batch.slices)
        model.deltas.begin(model.segments(item.num_tokens), model.segments(item.num_tokens))
        hidden = model.decoder.hidden_states(batch.tokens, batch.positions, self._kv)
        if first < item.num_tokens:
            take(item.start + first, model.decoder.logits(hidden[first:]))
