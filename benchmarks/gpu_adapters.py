"""Adapters for kernels that are timed alone: many, in scattered pages of a pool of one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_clock import LAUNCHES, ROTATED_BYTES
from benchmarks.gpu_setup import BLOCK_SIZE, DTYPE, Setup, relative_error
from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.formats.usual_deltas import Place
from polydelta.adapters_store.packed import PackedLayer
from polydelta.adapters_store.packed_deltas import (
    PackedBias,
    PackedDelta,
    PackedRotate,
    PackedScale,
    PackedTopK,
)
from polydelta.adapters_store.packed_tensors import vector_view
from polydelta.adapters_store.packing import pack
from polydelta.engine.delta_views import PackedAdd, add_weights, change_weights
from polydelta.engine.host_adapter import count_pages
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.pool_adapter import PoolAdapter, linear_site
from polydelta.kernels.delta_groups import DeltaGroup, DeltaSegment
from polydelta.kernels.delta_weights import LowRankWeights, dense
from polydelta.kernels.reference_deltas import add_delta, change_output

# Of so many the bytes differ; the others have the same in pages of their own.
DISTINCT = 4
# An adapter, by its seed.
Make = Callable[[BaseLayout, int], Adapter]


def one_layer(setup: Setup) -> BaseLayout:
    model = setup.sizes.model
    return base_layout(replace(model, num_layers=1, sliding_windows=(None,)), "one layer")


@dataclass(frozen=True, eq=False)
class StrongPlace(Place):
    """Draws larger numbers, so that what they do is no rounding error."""

    # Their standard deviation.
    strength: float = 1.0

    def numbers(self, *shape: int) -> Tensor:
        return self.strength * torch.randn(shape, generator=self.generator)


class AdapterSet:
    """Adapters of one form."""

    def __init__(self, setup: Setup, make: Make, count: int, bits: int | None = None) -> None:
        """bits: of low-rank matrices, 8 or 4; None: the dtype's."""
        self.setup = setup
        self.layout = one_layer(setup)
        made = [make(self.layout, seed) for seed in range(DISTINCT)]
        packed = [pack(one, self.layout, DTYPE, bits) for one in made]
        # Of one adapter.
        self.nbytes = packed[0].nbytes
        # Their only layers, where the kernels' pool is, too.
        self._layers = [
            PackedLayer(one.layers[0].data.to(setup.device), one.layers[0].deltas) for one in packed
        ]
        page_bytes = setup.sizes.page_bytes
        each = count_pages(packed[0], page_bytes, BLOCK_SIZE).weights
        storage = setup.kernels.zeros(1, each * count, page_bytes)
        order = torch.randperm(each * count, generator=torch.Generator().manual_seed(0)).tolist()
        self._bound = [
            PoolAdapter(
                packed[number % DISTINCT],
                storage,
                order[number * each : (number + 1) * each],
                setup.kernels,
            )
            for number in range(count)
        ]

    def group(self, first: int, batch: int, rows: int = 1) -> DeltaGroup:
        """So many adapters from the first on, each with so many rows."""
        segments = [
            DeltaSegment(row * rows, (row + 1) * rows, self._bound[first + row].sites)
            for row in range(batch)
        ]
        return self.setup.kernels.group_deltas(segments)

    def groups(self, batch: int) -> list[DeltaGroup]:
        """Of different adapters each, until no cache holds them all."""
        wanted = max(1, ROTATED_BYTES // (self.nbytes * batch))
        count = min(wanted, len(self._bound) // batch) if self.setup.on_gpu else 1
        return [self.group(number * batch, batch) for number in range(count)]

    def seconds(self, groups: Sequence[DeltaGroup], index: int, rows: int) -> float:
        """Of a group's launch at a linear layer, by its index in `BaseLayout.linears`."""
        y, x = self._output_input(index, rows)
        runs = [lambda group=group: group.apply(linear_site(0, index), y, x) for group in groups]
        if all(group.recordable for group in groups):
            return self.setup.clock.seconds(runs)
        repeats = max(1, LAUNCHES // len(runs)) if self.setup.on_gpu else 1
        return self.setup.clock.eager_seconds(runs * repeats)

    def error(self, index: int, batch: int, rows: int = 1) -> float:
        """The relative error of a launch, against float32. Where the base's output is not changed
        but added to it is 0, so that nothing hides in its rounding."""
        y, x = self._output_input(index, batch * rows)
        if not any(map(_changes, self._layers[0].deltas)):
            y.zero_()
        truth = y.float()
        for row in range(batch):
            own = slice(row * rows, (row + 1) * rows)
            self._apply_truth(self._layers[row % DISTINCT], index, truth[own], x[own])
        self.group(0, batch, rows).apply(linear_site(0, index), y, x)
        return relative_error(y, truth)

    def _output_input(self, index: int, rows: int) -> tuple[Tensor, Tensor]:
        linear = self.layout.linears[index]
        randn = self.setup.randn
        return randn(rows, linear.out_features), randn(rows, linear.in_features)

    def _apply_truth(self, layer: PackedLayer, index: int, y: Tensor, x: Tensor) -> None:
        """An adapter here has deltas of one kind at a linear layer: their order is no matter."""
        for delta in layer.deltas:
            if getattr(delta, "linear", None) != index:
                continue
            match delta:
                case PackedScale() | PackedRotate():
                    change_output(change_weights(delta, layer.data), y)
                case PackedBias():
                    vector = vector_view(layer.data, delta.vector)
                    y.narrow(1, delta.out_start, len(vector)).add_(vector)
                case PackedTopK():
                    # In float32 it would choose others.
                    add_delta(add_weights(delta, layer.data, DTYPE), y, x)
                case _ if isinstance(delta, PackedAdd):
                    add_delta(_widened(add_weights(delta, layer.data, DTYPE)), y, x.float())


def _changes(delta: PackedDelta) -> bool:
    return isinstance(delta, PackedScale | PackedRotate)


def _widened(weights: Any) -> Any:
    """The same numbers in float32."""
    if isinstance(weights, LowRankWeights):
        floats = torch.float32
        blocks = [replace(one, b_t=dense(one.b_t, floats).float()) for one in weights.blocks]
        return LowRankWeights(dense(weights.a, floats).float(), tuple(blocks))
    tensors = {each.name: getattr(weights, each.name) for each in fields(weights)}
    wide = {
        name: value.float()
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return replace(weights, **wide)
