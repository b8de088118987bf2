"""Tokens of a sequence on their way to other places of its own pages."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.kernels.kv_memory import KVKind, KVMemory
from polydelta.kernels.ops import SequenceSlice


def move_tokens(
    kind: KVKind,
    memory: KVMemory,
    part: SequenceSlice,
    sources: Tensor,
    keys: Tensor,
    values: Tensor,
    changed: Tensor,
) -> None:
    """Into the places from 0 on, for each kv head by itself: tokens from the places `sources`,
    `[kv_heads, n]` int64. Those that have changed become what keys and values say, `[kv_heads, n,
    head_dim]`; changed: `[kv_heads, n]` bool. Others stay as they are stored, bit for bit, unless
    the format is by page: then all pages are encoded again, and what does not fill one is open.
    """
    keys, values = keys.to(kind.dtype), values.to(kind.dtype)
    pages = torch.tensor(part.pages, device=sources.device)
    if kind.format.by_page:
        _encode_pages(kind, memory, part.slot, pages, keys, values)
        return
    size = kind.layout.block_size
    places = torch.arange(sources.shape[1], device=sources.device)
    heads, places = ((sources != places) | changed).nonzero(as_tuple=True)
    origins, new = sources[heads, places], changed[heads, places]
    # A token of one head is encoded by itself.
    which = heads[new], places[new]
    encoded = kind.format.encode(keys[which][:, None, None], values[which][:, None, None])
    for name in kind.stored:
        section = kind.layout.view(memory.pages, name)
        tokens = section[pages[origins // size], origins % size, heads]
        tokens[new] = encoded[name][:, 0, 0]
        section[pages[places // size], places % size, heads] = tokens


def _encode_pages(
    kind: KVKind, memory: KVMemory, slot: int, pages: Tensor, keys: Tensor, values: Tensor
) -> None:
    """keys, values: `[kv_heads, n, head_dim]`, all that the sequence has."""
    assert memory.open is not None
    size = kind.layout.block_size
    # [n, 2, kv_heads, head_dim]
    tokens = torch.stack((keys, values)).permute(2, 0, 1, 3)
    count = len(tokens) // size
    if count:
        closed = tokens[: count * size].unflatten(0, (count, size))
        for name, content in kind.format.encode(closed[:, :, 0], closed[:, :, 1]).items():
            kind.layout.view(memory.pages, name)[pages[:count]] = content
    memory.open[slot, : len(tokens) - count * size] = tokens[count * size :]
