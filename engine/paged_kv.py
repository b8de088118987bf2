"""The KV cache's memory: pages of the pool, as the decoder's attention layers see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polydelta.engine.models.config import ModelConfig
from polydelta.kernels.ops import AttentionShape, Kernels, SequenceSlice


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
        max_positions: int | None = None,
    ) -> None:
        """storage: the pool, `[layers, pages, page_bytes]` uint8. max_positions: tokens of the
        longest sequence; None for as many as there are pages for."""
        shape = (2, block_size, config.num_kv_heads, config.head_dim)
        # For each layer: [pages, 2, block_size, kv_heads, head_dim]
        self._layers = [layer.view(dtype).unflatten(-1, shape) for layer in storage]
        self._windows = config.sliding_windows
        positions = storage.shape[1] * block_size if max_positions is None else max_positions
        max_pages = -(-positions // block_size)
        self._shapes = {
            window: AttentionShape(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                block_size,
                window,
                max_pages,
            )
            for window in set(config.sliding_windows)
        }
        self._dtype = dtype
        self._kernels = kernels
        # Filled by `prepare`, for the step at hand.
        self._plans: Mapping[int | None, Any] = {}
        self._slots = torch.empty(0, dtype=torch.int64)

    @property
    def device(self) -> torch.device:
        return self._kernels.device

    def prepare(self, slots: Tensor, slices: Sequence[SequenceSlice]) -> None:
        """slots: `[tokens]` int64, where each row's KV goes; slices: whose rows they are."""
        self._slots = slots
        self._plans = {
            window: self._kernels.plan_attention(shape, slices, self._dtype)
            for window, shape in self._shapes.items()
        }

    @property
    def plans(self) -> list[Any]:
        """What attention was given by `prepare`."""
        return list(self._plans.values())

    def store(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Ready-made keys and values `[tokens, kv_heads, head_dim]`; slots: as in `prepare`."""
        self._kernels.store_kv(self._layers[layer], keys, values, slots)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kv = self._layers[layer]
        self._kernels.store_kv(kv, keys, values, self._slots)
        return self._kernels.attention(self._plans[self._windows[layer]], queries, kv)
