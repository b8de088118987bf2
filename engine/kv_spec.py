"""How an engine's KV cache is stored: the format, what selections add to a page, and its layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.engine.models.config import ModelConfig
from polydelta.kernels.kv_eviction import NOTED_BYTES
from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_formats.format import KVFormat, KVShape
from polydelta.kernels.kv_layout import PageLayout
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.kv_sections import native_tokens_of, page_layout_for
from polydelta.kernels.kv_selection import FULL, H2O, Selection, Window
from polydelta.kernels.ops import AttentionShape


def kv_page_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one layer's keys and values for `block_size` native tokens: the size of a page."""
    return 2 * block_size * config.kv_size * dtype.itemsize


@dataclass(frozen=True, eq=False)
class KVSpec:
    """The same for all layers and requests of an engine."""

    format: KVFormat
    layout: PageLayout
    config: ModelConfig
    # Of keys and values as the model computes them.
    dtype: torch.dtype
    # Of requests that ask for none.
    selection: Selection = FULL
    # Channels of keys that tell which tokens matter, [layers, kv_heads, labels] int64; or None.
    labels: Tensor | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        dtype: torch.dtype,
        native_tokens: int | None = None,
        format_name: str = "native",
        selection: Selection = FULL,
        labels: Tensor | None = None,
    ) -> KVSpec:
        """native_tokens: those that make the size of a page; None for what suits the format, or the
        selection. Raises ValueError for a format that cannot store the model's heads, or of which
        no token fits a page."""
        format = FORMATS[format_name]()
        if native_tokens is None:
            native_tokens = native_tokens_of(format, selection)
        page_bytes = kv_page_bytes(config, native_tokens, dtype)
        shape = KVShape(config.num_kv_heads, config.head_dim, dtype)
        layout = page_layout_for(format, selection, shape, page_bytes)
        if not layout.block_size:
            raise ValueError(
                f"A page of {native_tokens} native tokens has no room for a token in KV format "
                f"{format_name} with selection {selection}: raise block_size."
            )
        labels = None if labels is None else labels.contiguous()
        return cls(format, layout, config, dtype, selection, labels)

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return self.layout.block_size

    @property
    def page_bytes(self) -> int:
        return self.layout.page_bytes

    @property
    def token_bytes(self) -> float:
        """Of one token's share of its pages, all layers together."""
        return self.page_bytes * self.config.num_layers / self.block_size

    @property
    def is_plain(self) -> bool:
        """Whether a page is nothing but keys and values as the model computes them."""
        return self.format.name == "native" and len(self.layout.sections) == 2

    @property
    def open_bytes(self) -> int:
        """Of what one sequence has outside of the pool, all layers together."""
        if not self.format.by_page:
            return 0
        tokens = 2 * self.config.kv_size * self.block_size * self.dtype.itemsize
        return tokens * self.config.num_layers

    @property
    def noted_bytes(self) -> int:
        """Of what the server's own selection keeps beside a page, of each layer."""
        if not isinstance(self.selection, H2O):
            return 0
        return self.block_size * self.config.num_kv_heads * NOTED_BYTES

    @property
    def all_bytes(self) -> int:
        """Of a page of all layers, with what is kept beside it."""
        return (self.page_bytes + self.noted_bytes) * self.config.num_layers

    def opened_bytes(self, max_batch_size: int) -> int:
        """Of what so many sequences have outside of pages, and one that steps are recorded with."""
        return self.open_bytes * (max_batch_size + 1)

    def pages_in(self, pool_bytes: int, max_batch_size: int) -> int:
        """Of a pool, which also pays for what sequences have outside of pages."""
        return max(0, pool_bytes - self.opened_bytes(max_batch_size)) // self.all_bytes

    @property
    def read_at_most(self) -> int | None:
        """Tokens that a sequence holds at a time however long it is; None without such a limit."""
        if not isinstance(self.selection, Window):
            return None
        # A chunk of a prompt is no longer than what its queries see before them.
        held = self.selection.sinks + 2 * self.selection.recent
        return held + 2 * self.block_size

    def shape(self, window: int | None, max_positions: int) -> AttentionShape:
        """max_positions: tokens of the longest sequence."""
        config = self.config
        return AttentionShape(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            self.block_size,
            window,
            -(-max_positions // self.block_size),
        )

    def kind(self, shape: AttentionShape) -> KVKind:
        return KVKind(self.format, self.layout, shape, self.dtype, self.labels)
