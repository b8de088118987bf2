"""Adapters on top of a decoder that does not know them: its linear layers, wrapped.

Rows of a step are sorted by adapter, so that each adapter's rows are one slice. A wrapped layer
computes the base product for all rows at once and then adds each adapter's deltas to its slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from polydelta.adapters_store.packing import (
    PackedAdapter,
    PackedLowRank,
    PackedSparse,
    matrix_view,
    vector_view,
)
from polydelta.engine.models.decoder import Decoder
from polydelta.kernels.ops import (
    AddDelta,
    Kernels,
    Linear,
    LowRankBlock,
    LowRankWeights,
    SparseWeights,
)


class PoolAdapter:
    """An adapter whose packed bytes lie in pages of the pool.

    Where the pages are one run, kernels get views of the pool, made once. Where they are not, the
    layer at hand is read through the page table when a step comes to it.
    """

    def __init__(
        self, packed: PackedAdapter, storage: Tensor, pages: Sequence[int], kernels: Kernels
    ) -> None:
        """storage: the pool, `[layers, pages, page_bytes]` uint8."""
        self._kernels = kernels
        self._dtype = packed.dtype
        self._storage = storage
        self._pages = torch.tensor(pages)
        # What lies in each layer, without the host's copy of the bytes.
        self._deltas = [layer.deltas for layer in packed.layers]
        self._bound: dict[int, dict[int, list[AddDelta]]] = {}
        first, count = pages[0], len(pages)
        in_one_run = list(pages) == list(range(first, first + count))
        for layer, content in enumerate(packed.layers):
            if in_one_run:
                # One copy: page by page, rank 64 on the default model takes 16 ms instead of 2.4.
                data = storage[layer, first : first + count].view(-1)
                data[: len(content.data)] = content.data
                self._bound[layer] = self._bind(layer, data)
            else:
                self._scatter(layer, content.data, pages)

    def deltas(self, layer: int, linear: int) -> Sequence[AddDelta]:
        """What the adapter adds to one linear layer, by its index in `BaseLayout.linears`."""
        if layer not in self._bound:
            # Scattered pages: only the layer at hand is kept.
            data = self._storage[layer].index_select(0, self._pages).view(-1)
            self._bound = {layer: self._bind(layer, data)}
        return self._bound[layer].get(linear, ())

    def _scatter(self, layer: int, data: Tensor, pages: Sequence[int]) -> None:
        parts = data.split(self._storage.shape[-1])
        for part, page in zip(parts, pages, strict=False):
            self._storage[layer, page, : len(part)] = part

    def _bind(self, layer: int, data: Tensor) -> dict[int, list[AddDelta]]:
        bound: dict[int, list[AddDelta]] = {}
        for delta in self._deltas[layer]:
            weights = delta_weights(delta, data, self._dtype)
            if isinstance(weights, LowRankWeights):
                add = self._kernels.low_rank(weights)
            else:
                add = self._kernels.sparse(weights)
            bound.setdefault(delta.linear, []).append(add)
        return bound


def delta_weights(
    delta: PackedLowRank | PackedSparse, data: Tensor, dtype: torch.dtype
) -> LowRankWeights | SparseWeights:
    """A packed delta as the kernels take it: views of the layer's bytes."""
    if isinstance(delta, PackedSparse):
        return SparseWeights(
            vector_view(data, delta.row_pointers),
            vector_view(data, delta.columns),
            vector_view(data, delta.values),
        )
    blocks = tuple(
        LowRankBlock(block.out_start, block.rank_start, matrix_view(data, block.b_t, dtype))
        for block in delta.blocks
    )
    return LowRankWeights(matrix_view(data, delta.a, dtype), blocks)


@dataclass(frozen=True, eq=False)
class AdapterSegment:
    """Rows of a step that an adapter is added to: start : stop. Those of a sum of adapters are in
    one segment for each."""

    start: int
    stop: int
    adapter: PoolAdapter
    weight: float = 1.0


@dataclass(eq=False)
class StepDeltas:
    """What the wrapped layers add in the step at hand; rows of the bare base are in no segment."""

    segments: Sequence[AdapterSegment] = field(default_factory=tuple)


def wrap_decoder(decoder: Decoder, deltas: StepDeltas) -> None:
    """Puts the deltas of each step on top of every linear layer of the decoder's blocks."""
    for layer, block in enumerate(decoder.layers):
        block.wrap_linears(partial(_with_deltas, deltas, layer))


def _with_deltas(deltas: StepDeltas, layer: int, index: int, linear: Linear) -> Linear:
    def wrapped(x: Tensor) -> Tensor:
        y = linear(x)
        for segment in deltas.segments:
            adds = segment.adapter.deltas(layer, index)
            if adds:
                rows = slice(segment.start, segment.stop)
                # Every kind here is linear in x, so that the weight may be taken there.
                inputs = x[rows] if segment.weight == 1.0 else x[rows] * segment.weight
                for add in adds:
                    add(y[rows], inputs)
        return y

    return wrapped
