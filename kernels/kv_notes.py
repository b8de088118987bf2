"""What pages note of their keys for selections, in plain torch. It is made of keys as they are
stored, so that it belongs to the page, whoever reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.kernels.kv_memory import KVKind, KVMemory, decode_pages


def summarize(kind: KVKind, layer: int, pages: Tensor, closing: Tensor) -> None:
    """Of pages that have become full. pages: `[pages, page_bytes]` uint8; closing: `[n]` int64."""
    layout = kind.layout
    labelled = layout.has("labels") and kind.format.by_page
    if not (labelled or layout.has("key_least") or layout.has("representatives")):
        return
    # [n, block_size, kv_heads, head_dim]
    keys, _ = decode_pages(kind, KVMemory(pages), closing)
    if layout.has("key_least"):
        layout.view(pages, "key_least")[closing] = keys.amin(1).to(kind.dtype)
        layout.view(pages, "key_most")[closing] = keys.amax(1).to(kind.dtype)
    if layout.has("representatives"):
        places = layout.view(pages, "representatives")
        places[closing] = representatives(keys, places.shape[-1]).to(places.dtype)
    if labelled:
        layout.view(pages, "labels")[closing] = labels_of(kind, layer, keys)


def label_rows(kind: KVKind, layer: int, pages: Tensor, places: Tensor) -> None:
    """Of rows that have been stored, where each is encoded by itself. pages: as in `summarize`;
    places: `[rows]` int64, page * block_size + place."""
    if kind.format.by_page or not kind.layout.has("labels") or not len(places):
        return
    at = (places // kind.layout.block_size, places % kind.layout.block_size)
    stored = {name: kind.layout.view(pages, name)[at][:, None] for name in kind.stored}
    keys, _ = kind.format.decode(stored)
    kind.layout.view(pages, "labels")[at] = labels_of(kind, layer, keys[:, 0])


def labels_of(kind: KVKind, layer: int, keys: Tensor) -> Tensor:
    """The channels that calibration chose: `[..., kv_heads, head_dim]` -> `[..., kv_heads, labels]`
    of the model's dtype."""
    assert kind.labels is not None
    channels = kind.labels[layer].to(keys.device)
    return keys.gather(-1, channels.expand(*keys.shape[:-1], -1)).to(kind.dtype)


def representatives(keys: Tensor, count: int) -> Tensor:
    """For each kv head the tokens of a page whose keys score highest against the mean of all,
    best first. keys: `[n, tokens, kv_heads, head_dim]` -> places `[n, kv_heads, count]` int64.
    Where the page has fewer tokens, they come again.

    Those of arXiv:2402.04617 received most attention from tokens nearby. That depends on how steps
    were cut and on who asked; this is a function of the page alone.
    """
    # The sum for the mean: the order is the same. In float64 and not by a matrix product, which
    # rounds by how many pages there are.
    wide = keys.double().transpose(1, 2)
    scores = (wide * wide.sum(2, keepdim=True)).sum(-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., torch.arange(count, device=keys.device) % keys.shape[1]]
