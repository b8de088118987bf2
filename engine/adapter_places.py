"""Where an adapter's deltas lie among its bytes, for kernels that read through page tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.adapters_store.packed_deltas import (
    PackedBias,
    PackedDelta,
    PackedRotate,
    PackedScale,
)
from polydelta.adapters_store.packed_tensors import vector_view
from polydelta.engine.delta_views import PackedAdd, add_weights, change_weights
from polydelta.kernels.delta_groups import AdapterPlaces, OutputBias, SitePlaces

# Fused linear layers of a decoder layer: `BaseLayout.linears`.
LINEARS_PER_LAYER = 4


def adapter_places(
    layers: Sequence[tuple[PackedDelta, ...]],
    dtype: torch.dtype,
    storage: Tensor,
    pages: Sequence[int],
) -> AdapterPlaces:
    """layers: the deltas of each decoder layer; dtype: of matrices; storage: the pool, `[layers,
    pages, page_bytes]` uint8; pages: those of the adapter's weights."""
    # No memory: only offsets and strides are looked at.
    data = torch.empty(len(pages) * storage.shape[-1], dtype=torch.uint8, device="meta")
    sites: list[SitePlaces | None] = []
    # Most layers have the same deltas at the same places, and share them. Compared and not hashed,
    # which looks at all of them even where they are the same object.
    known: list[tuple[tuple[PackedDelta, ...], list[SitePlaces | None]]] = []
    for layer, deltas in enumerate(layers):
        places = next((places for same, places in known if same == deltas), None)
        if places is None:
            places = _layer_places(layer, deltas, data, dtype)
            known.append((deltas, places))
        sites += [site and site.in_layer(layer) for site in places]
    return AdapterPlaces(storage, pages, sites, dtype)


def _layer_places(
    layer: int, deltas: Sequence[PackedDelta], data: Tensor, dtype: torch.dtype
) -> list[SitePlaces | None]:
    """By index in `BaseLayout.linears`; None where a linear layer has no deltas."""
    places = [SitePlaces(layer) for _ in range(LINEARS_PER_LAYER)]
    for delta in deltas:
        linear = getattr(delta, "linear", -1)
        if linear < 0:
            continue
        match delta:
            case PackedBias():
                bias = OutputBias(delta.out_start, vector_view(data, delta.vector))
                places[linear].biases.append(bias)
            case PackedScale() | PackedRotate():
                places[linear].changes.append(change_weights(delta, data))
            case _ if isinstance(delta, PackedAdd):
                places[linear].adds.append(add_weights(delta, data, dtype))
    return [p if p.changes or p.adds or p.biases else None for p in places]
