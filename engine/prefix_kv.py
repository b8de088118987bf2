"""Puts the KV of an adapter's virtual tokens into pages of the pool, once for each version."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polydelta.adapters_store.packed import PackedPrefix
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.paged_kv import PagedKV
from polydelta.kernels.ops import SequenceSlice
from polydelta.kernels.upload import upload


def fill_prefix(
    prefix: PackedPrefix, pages: Sequence[int], slot: int, kv: PagedKV, decoder: Decoder
) -> None:
    """Keys and values are stored as they are; those of embeddings are computed by the bare base,
    whose deltas the caller has switched off (PEFT's prompt tuning, arXiv:2104.08691).

    slot: one that no sequence has."""
    places, size = range(prefix.num_tokens), kv.block_size
    device = kv.device
    slots = upload([pages[p // size] * size + p % size for p in places], device)
    prepared = prefix.values.to(device, non_blocking=True)
    kv.prepare(slots, [SequenceSlice(0, len(places), len(places), pages, slot=slot)])
    if prefix.embedded:
        decoder.forward_embedded(prepared, torch.arange(len(places), device=device), kv)
    else:
        for layer, (keys, values) in enumerate(prepared):
            kv.store(layer, keys, values)
    if len(places) % size:
        kv.close_early(slot, pages[-1], len(places) % size)
