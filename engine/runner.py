"""Runs the decoder for one step over the pool's memory, and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polydelta.adapters_store.catalog import AdapterRef
from polydelta.adapters_store.packing import PackedAdapter
from polydelta.engine.batch import Batch, build_batch
from polydelta.engine.deltas import AdapterSegment, PoolAdapter, StepDeltas, wrap_decoder
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.sampler import Sampler
from polydelta.engine.sequence import SampledToken, Schedule, Sequence as TokenSequence
from polydelta.kernels.ops import AttentionShape, Kernels


def kv_page_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one layer's keys and values for `block_size` tokens: the size of a page."""
    return 2 * block_size * config.kv_size * dtype.itemsize


class PagedKV:
    """One step's view of the KV cache; what the decoder's attention layers call."""

    def __init__(
        self,
        storage: Tensor,
        config: ModelConfig,
        block_size: int,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        """storage: the pool, `[layers, pages, page_bytes]` uint8."""
        shape = (2, block_size, config.num_kv_heads, config.head_dim)
        # For each layer: [pages, 2, block_size, kv_heads, head_dim]
        self._layers = [layer.view(dtype).unflatten(-1, shape) for layer in storage]
        self._windows = config.sliding_windows
        self._shapes = {
            window: AttentionShape(
                config.num_heads, config.num_kv_heads, config.head_dim, block_size, window
            )
            for window in set(config.sliding_windows)
        }
        self._dtype = dtype
        self._kernels = kernels
        # Filled by `prepare`, for the step at hand.
        self._plans: Mapping[int | None, Any] = {}
        self._slots = torch.empty(0, dtype=torch.int64)

    def prepare(self, batch: Batch) -> None:
        self._slots = batch.slots
        self._plans = {
            window: self._kernels.plan_attention(shape, batch.slices, self._dtype)
            for window, shape in self._shapes.items()
        }

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kv = self._layers[layer]
        self._kernels.store_kv(kv, keys, values, self._slots)
        return self._kernels.attention(self._plans[self._windows[layer]], queries, kv)


class Runner:
    """The torch side of the engine: the model, the pool's memory, the sampler."""

    def __init__(
        self,
        decoder: Decoder,
        kernels: Kernels,
        num_pages: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        config = decoder.config
        self._decoder = decoder
        self._kernels = kernels
        self._block_size = block_size
        page_bytes = kv_page_bytes(config, block_size, dtype)
        # [layers, pages, page_bytes]
        self._storage = torch.zeros((config.num_layers, num_pages, page_bytes), dtype=torch.uint8)
        self._kv = PagedKV(self._storage, config, block_size, dtype, kernels)
        self._deltas = StepDeltas()
        wrap_decoder(decoder, self._deltas)
        self._sampler = Sampler(config.vocab_size)

    def bind_adapter(self, packed: PackedAdapter, pages: Sequence[int]) -> PoolAdapter:
        """Copies a packed adapter into pages of the pool."""
        return PoolAdapter(packed, self._storage, pages, self._kernels)

    @torch.inference_mode()
    def step(
        self, schedule: Schedule, bound: Callable[[AdapterRef], PoolAdapter]
    ) -> list[SampledToken | None]:
        """Computes a step; the sampled token of each scheduled sequence, where one is due."""
        batch = build_batch(schedule, self._block_size)
        logits = self._logits(batch, bound)
        chosen = self._sampler.sample(logits, [item.sequence for item in batch.sampling])
        by_sequence = {
            item.sequence: token for item, token in zip(batch.sampling, chosen, strict=True)
        }
        return [by_sequence.get(item.sequence) for item in schedule]

    def forget(self, sequence: TokenSequence) -> None:
        """Drops what the sampler kept for a sequence that has left."""
        self._sampler.forget(sequence)

    def _logits(self, batch: Batch, bound: Callable[[AdapterRef], PoolAdapter]) -> Tensor:
        """`[samples, vocab]` float32."""
        self._kv.prepare(batch)
        self._deltas.segments = [
            AdapterSegment(rows.start, rows.stop, bound(rows.adapter))
            for rows in batch.adapter_rows
        ]
        hidden = self._decoder.hidden_states(batch.tokens, batch.positions, self._kv)
        return self._decoder.logits(hidden.index_select(0, batch.sample_rows))
