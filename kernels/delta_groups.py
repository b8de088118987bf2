"""What the adapters of a step do to the outputs of linear layers: bound once, grouped each step.

A site is a linear layer of the decoder, by its number. An adapter's deltas at a site are applied to
the rows that want it; a backend may do that for all adapters of a step in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from polydelta.kernels.delta_weights import AddWeights, ChangeWeights

# x: [tokens, in] -> [tokens, out]
Linear = Callable[[Tensor], Tensor]
# add(y, x): y += f(x), in place; y: [tokens, out], x: [tokens, in]
AddDelta = Callable[[Tensor, Tensor], None]
# change(y): y = f(y), in place; y: [tokens, out]
ChangeOutput = Callable[[Tensor], None]


@dataclass(frozen=True, eq=False)
class OutputBias:
    """`y[:, start : start + count] += vector`."""

    start: int
    # [count] float32
    vector: Tensor

    @property
    def count(self) -> int:
        return len(self.vector)

    def add(self, y: Tensor, weight: float) -> None:
        y.narrow(1, self.start, self.count).add_(self.vector, alpha=weight)


@dataclass(eq=False)
class SiteDeltas:
    """An adapter's deltas at one site, in the order in which they are applied: see
    `adapters_store/linear_deltas.py`."""

    changes: list[ChangeOutput] = field(default_factory=list)
    adds: list[AddDelta] = field(default_factory=list)
    biases: list[OutputBias] = field(default_factory=list)

    def apply(self, y: Tensor, x: Tensor, weight: float) -> None:
        """y: `[rows, out]`, the base's output for x `[rows, in]`, changed in place. weight: the
        adapter's in a sum, of what it adds."""
        for change in self.changes:
            change(y)
        if self.adds:
            # What can be in a sum is linear in x, so that the weight may be taken there.
            inputs = x if weight == 1.0 else x * weight
            for add in self.adds:
                add(y, inputs)
        for bias in self.biases:
            bias.add(y, weight)


class AdapterSites(Protocol):
    """An adapter's deltas at every site; None where it has none."""

    def __getitem__(self, site: int, /) -> SiteDeltas | None: ...


@dataclass(eq=False)
class SitePlaces:
    """Where an adapter's deltas at one site lie among its bytes, in the order in which they are
    applied: the tensors are on torch's `meta` device, and their storage begins where the bytes of
    the site's decoder layer do."""

    layer: int
    changes: list[ChangeWeights] = field(default_factory=list)
    adds: list[AddWeights] = field(default_factory=list)
    biases: list[OutputBias] = field(default_factory=list)

    def in_layer(self, layer: int) -> SitePlaces:
        """The same places among the bytes of another decoder layer."""
        return SitePlaces(layer, self.changes, self.adds, self.biases)


@dataclass(frozen=True, eq=False)
class AdapterPlaces:
    """An adapter in pages of the pool, which may lie anywhere."""

    # The pool: [layers, pages, page_bytes] uint8
    storage: Tensor
    # A layer's bytes are cut over these pages of that layer, in this order.
    pages: Sequence[int]
    # By site.
    sites: Sequence[SitePlaces | None]
    # Of matrices and sparse values.
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class DeltaSegment:
    """Rows of a step, start : stop, that an adapter acts on."""

    start: int
    stop: int
    # As `bind_sites` or `bind_pages` returns it, or any other.
    sites: AdapterSites
    weight: float = 1.0


class DeltaGroup(Protocol):
    """All adapters of a step."""

    @property
    def recordable(self) -> bool:
        """Whether it can be one of the inputs of a recorded step."""

    def multiply(self, site: int, linear: Linear, x: Tensor) -> Tensor:
        """`linear(x)` with the deltas: x `[tokens, in]` -> `[tokens, out]`."""

    def apply(self, site: int, y: Tensor, x: Tensor) -> None:
        """y: `[tokens, out]`, the base's output for x `[tokens, in]`, changed in place."""


class SegmentLoop:
    """Segment by segment."""

    recordable = False

    def __init__(self, segments: Sequence[DeltaSegment]) -> None:
        self._segments = segments

    def multiply(self, site: int, linear: Linear, x: Tensor) -> Tensor:
        y = linear(x)
        self.apply(site, y, x)
        return y

    def apply(self, site: int, y: Tensor, x: Tensor) -> None:
        for segment in self._segments:
            deltas = segment.sites[site]
            if deltas is not None:
                rows = slice(segment.start, segment.stop)
                deltas.apply(y[rows], x[rows], segment.weight)
