"""The KV cache's memory in whatever format: what a cache holds, and how pages of it are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.kernels.kv_formats.format import KVFormat, KVShape
from polydelta.kernels.kv_layout import PageLayout
from polydelta.kernels.ops import AttentionShape, SequenceSlice


@dataclass(frozen=True, eq=False)
class KVKind:
    """What a cache holds, the same in all layers but for windows."""

    format: KVFormat
    layout: PageLayout
    shape: AttentionShape
    # Of keys and values as they are computed.
    dtype: torch.dtype
    # Channels that tell which tokens matter, [layers, kv_heads, labels] int64; None without them.
    labels: Tensor | None = None

    @property
    def stored(self) -> Sequence[str]:
        """The sections that keys and values are encoded in."""
        tokens = KVShape(self.shape.num_kv_heads, self.shape.head_dim, self.dtype)
        sections = self.format.sections(self.layout.block_size, tokens)
        return [section.name for section in sections]


@dataclass(frozen=True, eq=False)
class KVMemory:
    """One layer's part of the cache."""

    # The pool, [pages, page_bytes] uint8.
    pages: Tensor
    # Where the format is by page: what is not a whole page yet, by the sequence's slot,
    # [slots, block_size, 2, kv_heads, head_dim], keys at 0 and values at 1. None elsewhere.
    open: Tensor | None = None
    # Pages in host RAM, [host pages, page_bytes] uint8: page i of them is len(pages) + i in a
    # sequence's pages. None where no page can be there.
    host: Tensor | None = None


def decode_blocks(
    kind: KVKind, memory: KVMemory, part: SequenceSlice, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of some of a sequence's pages, each `[n, block_size, kv_heads, head_dim]`
    float32. blocks: `[n]` int64, places in `part.pages`."""
    pages = torch.tensor(part.pages, device=blocks.device)[blocks]
    keys, values = decode_pages(kind, memory, pages)
    if kind.format.by_page:
        assert memory.open is not None
        # The page of the queries is not encoded yet.
        last = blocks == (part.context - 1) // kind.layout.block_size
        tokens = memory.open[part.slot].float()
        keys[last], values[last] = tokens[:, 0], tokens[:, 1]
    return keys, values


def decode_tokens(
    kind: KVKind, memory: KVMemory, part: SequenceSlice, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values as they are stored. tokens: `[kv_heads, n]` int64, places of a sequence ->
    two of `[kv_heads, n, head_dim]` float32."""
    size = kind.layout.block_size
    heads = torch.arange(len(tokens), device=tokens.device)[:, None]
    blocks, where = (tokens // size).unique(return_inverse=True)
    keys, values = decode_blocks(kind, memory, part, blocks)
    places = tokens % size
    return keys[where, places, heads], values[where, places, heads]


def decode_pages(kind: KVKind, memory: KVMemory, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as they are stored, each `[n, block_size, kv_heads, head_dim]` float32.
    pages: `[n]` int64."""
    return kind.format.decode({name: section_of(kind, memory, name, pages) for name in kind.stored})


def section_of(kind: KVKind, memory: KVMemory, name: str, pages: Tensor) -> Tensor:
    """One section of some pages, `[pages, *section.shape]`, wherever they lie."""
    in_pool = kind.layout.view(memory.pages, name)
    if memory.host is None:
        return in_pool[pages]
    count = len(in_pool)
    on_host = kind.layout.view(memory.host, name)
    away = pages >= count
    result = in_pool[pages.where(~away, 0)]
    result[away] = on_host[(pages[away] - count).to(on_host.device)].to(result.device)
    return result
