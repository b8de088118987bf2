"""Adapters that `groups.c` reads wherever their pages are, and how their bytes get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from polydelta.kernels.cpu.native import Field, NativePool, Struct
from polydelta.kernels.delta_groups import (
    AdapterPlaces,
    AdapterSites,
    OutputBias,
    SiteDeltas,
    SitePlaces,
)
from polydelta.kernels.delta_weights import AddWeights, ChangeWeights, LowRankWeights, Matrix

# Of pages, so that none of them cuts a vector.
ALIGNMENT = 64
BFLOAT16_BYTES = 2


Weights = TypeVar("Weights", bound=AddWeights | ChangeWeights | OutputBias)


@dataclass(frozen=True, eq=False)
class PagedSites:
    """Low-rank deltas in pages of the pool."""

    # The struct `Adapter` of `step_adapters.c`.
    struct: Struct
    # Numbers of all matrices.
    size: int
    # For who computes without `groups.c`.
    others: AdapterSites

    def __getitem__(self, site: int) -> SiteDeltas | None:
        return self.others[site]

    @property
    def address(self) -> int:
        return self.struct.address


def bind_pages(places: AdapterPlaces, others: AdapterSites) -> PagedSites | None:
    """See `ops.PagedKernels`. None where there is anything but low-rank matrices in bfloat16."""
    page_bytes = places.storage.shape[-1]
    if page_bytes % ALIGNMENT or places.dtype != torch.bfloat16:
        return None
    # Most layers have the same deltas at the same places, and share them.
    known: dict[int, tuple[Struct, int]] = {}
    bound: list[Field] = []
    size = 0
    for site in places.sites:
        if site is None:
            bound += (None, 0)
            continue
        key = id(site.adds)
        if key not in known:
            weights = _low_rank(site)
            if weights is None:
                return None
            known[key] = _site(weights), sum(map(_size, weights))
        struct, numbers = known[key]
        bound += (struct, site.layer)
        size += numbers
    return PagedSites(Struct((Struct(bound), *_pages(places), None, None)), size, others)


class CopiedLayers:
    """Where an adapter lies of which one layer at a time is copied together, since its kinds of
    deltas are not read in pages."""

    def __init__(self, places: AdapterPlaces, others: AdapterSites) -> None:
        """others: for who computes without `groups.c`."""
        self.others = others
        self.layers = [0 if site is None else site.layer for site in places.sites]
        # [bytes of the adapter's pages in a layer] uint8
        nbytes = len(places.pages) * places.storage.shape[-1]
        # A multiple of any dtype's size.
        self._memory = torch.empty(-(-nbytes // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8)
        # The layer that is there at the moment.
        copied = torch.tensor([-1])
        # Of the struct `Adapter`, after its sites.
        self.fields: tuple[Field, ...] = (*_pages(places), self._memory, copied)

    def placed(self, weights: Weights) -> Weights:
        """The same weights, in the copy instead of at places in the layer."""
        return cast(Weights, _placed(weights, self._memory))


def _placed(weights: Any, memory: Tensor) -> Any:
    match weights:
        case Tensor():
            where = weights.shape, weights.stride(), weights.storage_offset()
            return memory.view(weights.dtype).as_strided(*where)
        case tuple():
            return tuple(_placed(part, memory) for part in weights)
        case _ if is_dataclass(weights) and not isinstance(weights, type):
            values = {f.name: _placed(getattr(weights, f.name), memory) for f in fields(weights)}
            return replace(weights, **values)
        case _:
            return weights


def _pages(places: AdapterPlaces) -> tuple[Field, ...]:
    """Of the struct `Adapter`."""
    storage, page_bytes = places.storage, places.storage.shape[-1]
    starts = torch.tensor(places.pages, dtype=torch.int64) * page_bytes
    return storage, storage.stride(0), starts, len(places.pages), page_bytes


def write_pages(
    pool: NativePool, storage: Tensor, pages: Sequence[int], layers: Sequence[Tensor]
) -> None:
    """See `ops.Kernels.write_pages`."""
    num_layers, _, page_bytes = storage.shape
    pool.call(
        "write_pages",
        storage,
        storage.stride(0),
        Struct(layers),
        torch.tensor([layer.numel() for layer in layers]),
        torch.tensor(pages, dtype=torch.int64) * page_bytes,
        num_layers,
        len(pages),
        page_bytes,
    )


def _low_rank(site: SitePlaces) -> list[LowRankWeights] | None:
    """None where it has other deltas, or codes of 8 or 4 bits."""
    low_rank = [add for add in site.adds if isinstance(add, LowRankWeights)]
    plain = all(isinstance(weights.a, Tensor) for weights in low_rank)
    if site.changes or site.biases or len(low_rank) < len(site.adds) or not plain:
        return None
    return low_rank


def _site(each: Sequence[LowRankWeights]) -> Struct:
    """`Site`."""
    deltas = Struct([f for weights in each for f in (None, _struct(weights), 0, 0, 0, 0)])
    first, last = _extent([matrix for weights in each for matrix in _matrices(weights)])
    return Struct((True, len(each), deltas, first, last - first))


def _struct(weights: LowRankWeights) -> Struct:
    """`LowRank`, with places among the layer's bytes for addresses."""
    blocks: list[int] = []
    for block in weights.blocks:
        rank, out_features = block.b_t.shape
        blocks += (block.out_start, out_features, block.rank_start, rank, *_place(block.b_t))
    rank = weights.a.shape[0]
    return Struct((rank, *_place(weights.a), len(weights.blocks), Struct(blocks)))


def _place(matrix: Matrix) -> tuple[int, int]:
    """Bytes before it, and elements between its rows."""
    assert isinstance(matrix, Tensor)
    return int(matrix.storage_offset()) * matrix.itemsize, matrix.stride(0)


def _matrices(weights: LowRankWeights) -> list[Matrix]:
    return [weights.a, *(block.b_t for block in weights.blocks)]


def _extent(matrices: Sequence[Matrix]) -> tuple[int, int]:
    """Bytes before the first one, and up to the end of the last one."""
    places = [(*_place(matrix), matrix.shape[0]) for matrix in matrices]
    ends = [offset + rows * stride * BFLOAT16_BYTES for offset, stride, rows in places]
    return min(offset for offset, _, _ in places), max(ends)


def _size(weights: LowRankWeights) -> int:
    return sum(rows * columns for rows, columns in (m.shape for m in _matrices(weights)))
