"""An adapter in pages of the pool."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polydelta.adapters_store.packed import PackedAdapter, PackedLayer
from polydelta.adapters_store.packed_deltas import FINAL_NORM_INDEX, PackedInputScale, PackedNorm
from polydelta.engine.adapter_places import LINEARS_PER_LAYER, adapter_places
from polydelta.engine.linear_deltas import LayerDeltas, LinearDeltas, bind_layer
from polydelta.engine.token_deltas import (
    EmbeddingDeltas,
    HeadDeltas,
    TokenDeltas,
    bind_tokens,
    changes_tokens,
)
from polydelta.kernels.delta_groups import AdapterSites, SiteDeltas
from polydelta.kernels.ops import Kernels, PagedKernels
from polydelta.kernels.page_writing import in_one_run
from polydelta.kernels.upload import upload


def linear_site(layer: int, index: int) -> int:
    """The number of a linear layer in the decoder; index: in `BaseLayout.linears`."""
    return layer * LINEARS_PER_LAYER + index


class PoolAdapter:
    """An adapter whose packed bytes lie in pages of the pool.

    Where the pages are one run, kernels get views of the pool, made once. Where they are not, the
    layer at hand is copied together when a step comes to it. Kernels that read through page tables
    need neither, but for rare kinds of deltas.
    """

    def __init__(
        self, packed: PackedAdapter, storage: Tensor, pages: Sequence[int], kernels: Kernels
    ) -> None:
        """storage: the pool, `[layers, pages, page_bytes]` uint8; pages: those of its weights."""
        self._kernels = kernels
        self._dtype = packed.dtype
        self._storage = storage
        self._pages = upload(pages, storage.device)
        # What lies in each layer, without the host's copy of the bytes.
        self._deltas = [layer.deltas for layer in packed.layers]
        # What is bound. Of scattered pages: the layer at hand, and tokens never.
        self._layers: dict[int, LayerDeltas] = {}
        # Most layers share theirs.
        different = list({id(deltas): deltas for deltas in self._deltas}.values())
        self.changes_tokens = changes_tokens(different)
        self._tokens = None if self.changes_tokens else TokenDeltas()
        each = [delta for deltas in different for delta in deltas]
        self.scales_inputs = any(isinstance(delta, PackedInputScale) for delta in each)
        self.changes_norms = any(isinstance(delta, PackedNorm) for delta in each)
        self._first = pages[0] if pages else 0
        self._in_one_run = in_one_run(pages)
        kernels.write_pages(storage, pages, [layer.data for layer in packed.layers])
        if self._in_one_run:
            self._tokens = self._of_tokens()
        # What it does to the outputs of linear layers, by `linear_site`.
        self.sites: AdapterSites = _BoundSites(self)
        if isinstance(kernels, PagedKernels):
            places = adapter_places(self._deltas, packed.dtype, storage, pages)
            self.sites = kernels.bind_pages(places, self.sites)
        elif self._in_one_run:
            count = linear_site(len(packed.layers), 0)
            self.sites = kernels.bind_sites([self.sites[site] for site in range(count)])

    def linear(self, layer: int, index: int) -> LinearDeltas | None:
        """What it does to one linear layer, by its index in `BaseLayout.linears`."""
        return self._layer(layer).linears.get(index)

    def norm(self, layer: int, index: int) -> Tensor | None:
        """The weight of a norm, by its index in `BaseLayout.norms`, where it has its own."""
        return self._layer(layer).norms.get(index)

    @property
    def final_norm(self) -> Tensor | None:
        return self.norm(0, FINAL_NORM_INDEX)

    @property
    def embedding(self) -> EmbeddingDeltas | None:
        return self._of_tokens().embedding

    @property
    def head(self) -> HeadDeltas | None:
        return self._of_tokens().head

    def _data(self, layer: int) -> Tensor:
        """The layer's bytes: a view of the pool, or a copy where the pages are scattered."""
        if self._in_one_run:
            stop = self._first + len(self._pages)
            return self._storage[layer, self._first : stop].view(-1)
        return self._storage[layer].index_select(0, self._pages).view(-1)

    def _in_pool(self, layer: int) -> PackedLayer:
        return PackedLayer(self._data(layer), self._deltas[layer])

    def _layer(self, layer: int) -> LayerDeltas:
        if layer not in self._layers:
            kept = self._layers if self._in_one_run else {}
            self._layers = {**kept, layer: self._bind(layer)}
        return self._layers[layer]

    def _bind(self, layer: int) -> LayerDeltas:
        return bind_layer(self._in_pool(layer), self._dtype, self._kernels)

    def _of_tokens(self) -> TokenDeltas:
        if self._tokens is not None:
            return self._tokens
        layers = [self._in_pool(layer) for layer in range(len(self._deltas))]
        return bind_tokens(layers, self._dtype, self._kernels)


class _BoundSites:
    """The sites of an adapter, bound when they are asked for."""

    def __init__(self, adapter: PoolAdapter) -> None:
        self._adapter = adapter

    def __getitem__(self, site: int) -> SiteDeltas | None:
        deltas = self._adapter.linear(*divmod(site, LINEARS_PER_LAYER))
        return None if deltas is None else deltas.output
