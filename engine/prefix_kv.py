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
    prefix: PackedPrefix, pages: Sequence[int], block_size: int, kv: PagedKV, decoder: Decoder
) -> None:
    """Keys and values are stored as they are; those of embeddings are computed by the bare base,
    whose deltas the caller has switched off (PEFT's prompt tuning, arXiv:2104.08691)."""
    places = range(prefix.num_tokens)
    device = kv.device
    slots = upload([pages[p // block_size] * block_size + p % block_size for p in places], device)
    prepared = prefix.values.to(device, non_blocking=True)
    if prefix.embedded:
        whole = SequenceSlice(0, len(places), len(places), pages)
        kv.prepare(slots, [whole])
        decoder.forward_embedded(prepared, torch.arange(len(places), device=device), kv)
        return
    for layer, (keys, values) in enumerate(prepared):
        kv.store(layer, keys, values, slots)
