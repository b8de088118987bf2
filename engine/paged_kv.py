"""The KV cache's memory: pages of the pool, as the decoder's attention layers see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.page_copies import PageCopy
from polydelta.kernels.kv_attention import KVAttention, KVKernels
from polydelta.kernels.kv_memory import KVMemory, decode_pages
from polydelta.kernels.kv_selection import FULL
from polydelta.kernels.ops import Kernels, SequenceSlice
from polydelta.kernels.upload import upload


class PagedKV:
    """One step's view of the KV cache; what the decoder's attention layers call."""

    def __init__(
        self,
        storage: Tensor,
        spec: KVSpec,
        kernels: Kernels,
        max_positions: int | None = None,
        slots: int = 1,
    ) -> None:
        """storage: the pool, `[layers, pages, page_bytes]` uint8. max_positions: tokens of the
        longest sequence; None for as many as there are pages for. slots: sequences that run at the
        same time."""
        config = spec.config
        self._spec = spec
        self._storage = storage
        self._kernels = kernels
        self._windows = config.sliding_windows
        positions = storage.shape[1] * spec.block_size if max_positions is None else max_positions
        self._shapes = {
            window: spec.shape(window, positions) for window in set(config.sliding_windows)
        }
        # For each layer: [pages, 2, block_size, kv_heads, head_dim]
        self._native = _native_layers(storage, spec) if spec.is_plain else []
        self._memories = _memories(storage, spec, kernels, slots)
        self._attentions: dict[int | None, KVAttention] = {}
        # Filled by `prepare`, for the step at hand.
        self._plans: Mapping[int | None, Any] = {}
        self._slots = torch.empty(0, dtype=torch.int64)
        self.is_plain = True

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return self._spec.block_size

    @property
    def device(self) -> torch.device:
        return self._kernels.device

    def add_host_pages(self, memory: Tensor) -> None:
        """memory: `[host pages, layers, page_bytes]` uint8; sequences count them after the pool's
        pages."""
        each = zip(self._memories, memory.unbind(1), strict=True)
        self._memories = [replace(layer, host=host) for layer, host in each]

    def prepare(self, slots: Tensor, slices: Sequence[SequenceSlice]) -> None:
        """slots: `[tokens]` int64, where each row's KV goes: page * block_size + place; slices:
        whose rows they are."""
        self._slots = slots
        # Whether the step is one of plain attention over native pages, which is the fastest.
        self.is_plain = self._spec.is_plain and all(each.selection == FULL for each in slices)
        self._plans = {window: self._plan(window, slices) for window in self._shapes}

    @property
    def plans(self) -> list[Any]:
        """What attention was given by `prepare`."""
        return list(self._plans.values())

    @property
    def recordable(self) -> bool:
        """Whether a recording of such a step can be replayed with other plans."""
        return all(getattr(plan, "recordable", False) for plan in self._plans.values())

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Ready-made keys and values `[tokens, kv_heads, head_dim]` of all rows of the step."""
        if self.is_plain:
            self._kernels.store_kv(self._native[layer], keys, values, self._slots)
            return
        window, memory = self._windows[layer], self._memories[layer]
        attention = self._attention(window)
        keys = attention.rotated(keys)
        for part in self._plans[window].rounds:
            attention.store(part, memory, keys, values)
            attention.close(part, layer, memory)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        window = self._windows[layer]
        plan = self._plans[window]
        if self.is_plain:
            kv = self._native[layer]
            self._kernels.store_kv(kv, keys, values, self._slots)
            return self._kernels.attention(plan, queries, kv)
        memory = self._memories[layer]
        return self._attention(window).attend(plan, layer, memory, queries, keys, values)

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """The first tokens of pages, in all layers, to where sequences begin."""
        for each in copies:
            if not self._spec.format.by_page:
                self._storage[:, each.target] = self._storage[:, each.source]
                continue
            source = upload([each.source], self.device)
            for layer, memory in enumerate(self._memories):
                kind = self._attention(self._windows[layer]).kind
                keys, values = decode_pages(kind, memory, source)
                assert memory.open is not None
                tokens = torch.stack((keys[0], values[0]), 1)[: each.num_tokens]
                memory.open[each.slot, : each.num_tokens] = tokens.to(memory.open.dtype)

    def close_early(self, slot: int, page: int, num_tokens: int) -> None:
        """Encodes a page that nothing will be added to, of which a slot has so many tokens, where
        the format is by page."""
        if not self._spec.format.by_page:
            return
        pages, slots = upload([page, slot], self.device).split(1)
        for layer, memory in enumerate(self._memories):
            assert memory.open is not None
            # As if its last token came again and again, which changes no bounds.
            memory.open[slot, num_tokens:] = memory.open[slot, num_tokens - 1]
            self._attention(self._windows[layer]).encode_open(memory, layer, pages, slots)

    def forget(self, slot: int) -> None:
        """The slot's sequence has left: drops what is kept of it beside its pages."""
        for attention in self._attentions.values():
            attention.forget(slot)

    def _plan(self, window: int | None, slices: Sequence[SequenceSlice]) -> Any:
        if self.is_plain:
            return self._kernels.plan_attention(self._shapes[window], slices, self._spec.dtype)
        return self._attention(window).plan(slices)

    def _attention(self, window: int | None) -> KVAttention:
        if window not in self._attentions:
            assert isinstance(self._kernels, KVKernels)
            kind = self._spec.kind(self._shapes[window])
            self._attentions[window] = self._kernels.kv_attention(kind)
        return self._attentions[window]


def _native_layers(storage: Tensor, spec: KVSpec) -> list[Tensor]:
    config = spec.config
    shape = (2, spec.block_size, config.num_kv_heads, config.head_dim)
    return [layer.view(spec.dtype).unflatten(-1, shape) for layer in storage]


def _memories(storage: Tensor, spec: KVSpec, kernels: Kernels, slots: int) -> list[KVMemory]:
    """For each layer."""
    config, layers = spec.config, len(storage)
    opened: list[Tensor | None] = [None] * layers
    if spec.format.by_page:
        shape = (slots, spec.block_size, 2, config.num_kv_heads, config.head_dim)
        elements = slots * spec.block_size * 2 * config.kv_size
        memory = kernels.zeros(layers, elements * spec.dtype.itemsize)
        opened = [layer.view(spec.dtype).view(shape) for layer in memory]
    return [KVMemory(*each) for each in zip(storage, opened, strict=True)]
