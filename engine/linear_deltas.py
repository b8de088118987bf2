"""What one adapter does to the (fused) linear layers and the norms of a decoder layer, ready to be
applied to rows of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polydelta.adapters_store.packed import PackedLayer
from polydelta.adapters_store.packed_deltas import (
    PackedBias,
    PackedInputScale,
    PackedNorm,
    PackedRotate,
    PackedScale,
)
from polydelta.adapters_store.packed_tensors import vector_view
from polydelta.engine.delta_views import PackedAdd, PackedChange, add_weights, change_weights
from polydelta.kernels.delta_groups import Linear, OutputBias, SiteDeltas
from polydelta.kernels.ops import Kernels

# What is bound to a linear layer.
PackedLinear = PackedAdd | PackedChange | PackedInputScale | PackedBias


@dataclass(frozen=True, eq=False)
class PartScale:
    """What the input of some columns of y, start : start + count, is multiplied with."""

    start: int
    count: int
    # [in] float32
    vector: Tensor


@dataclass(eq=False)
class LinearDeltas:
    """In the order in which they are applied: see `adapters_store/linear_deltas.py`."""

    # [in] float32: what the base's input is multiplied with
    input_scale: Tensor | None = None
    # The same for some outputs only, which must be computed once more.
    part_scales: list[PartScale] = field(default_factory=list)
    # What is done to the output then.
    output: SiteDeltas = field(default_factory=SiteDeltas)

    @property
    def scales_input(self) -> bool:
        return self.input_scale is not None or bool(self.part_scales)

    def apply(self, y: Tensor, x: Tensor, weight: float, base: Linear) -> None:
        """y `[rows, out]`: the base's product of x `[rows, in]`, times `input_scale`, changed in
        place. weight: the adapter's in a sum, of what it adds."""
        self.scale_parts(y, x, base)
        self.output.apply(y, x, weight)

    def scale_parts(self, y: Tensor, x: Tensor, base: Linear) -> None:
        """`part_scales` alone; arguments as in `apply`."""
        for part in self.part_scales:
            again = base((x * part.vector).to(x.dtype)).narrow(1, part.start, part.count)
            y.narrow(1, part.start, part.count).copy_(again)

    def bind(self, delta: PackedLinear, data: Tensor, dtype: torch.dtype, kernels: Kernels) -> None:
        """One more. data: the layer's bytes in the pool; dtype: the adapter's."""
        match delta:
            case PackedInputScale() if delta.whole:
                self.input_scale = vector_view(data, delta.vector)
            case PackedInputScale():
                vector = vector_view(data, delta.vector)
                self.part_scales.append(PartScale(delta.out_start, delta.out_features, vector))
            case PackedBias():
                bias = OutputBias(delta.out_start, vector_view(data, delta.vector))
                self.output.biases.append(bias)
            case PackedScale() | PackedRotate():
                self.output.changes.append(kernels.change_output(change_weights(delta, data)))
            case _:
                self.output.adds.append(kernels.add_delta(add_weights(delta, data, dtype)))


@dataclass(frozen=True, eq=False)
class LayerDeltas:
    """Of one decoder layer."""

    # By index in `BaseLayout.linears`.
    linears: Mapping[int, LinearDeltas]
    # By index in `BaseLayout.norms`, or FINAL_NORM_INDEX: the weight that replaces the base's.
    norms: Mapping[int, Tensor]


def bind_layer(layer: PackedLayer, dtype: torch.dtype, kernels: Kernels) -> LayerDeltas:
    """layer: its bytes in the pool; dtype: the adapter's."""
    linears: defaultdict[int, LinearDeltas] = defaultdict(LinearDeltas)
    norms: dict[int, Tensor] = {}
    for delta in layer.deltas:
        if isinstance(delta, PackedLinear) and delta.linear >= 0:
            linears[delta.linear].bind(delta, layer.data, dtype, kernels)
        elif isinstance(delta, PackedNorm):
            norms[delta.norm] = vector_view(layer.data, delta.weight)
    return LayerDeltas(dict(linears), norms)
