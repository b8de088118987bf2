"""What one adapter does to one (fused) linear layer, ready to be applied to rows of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polydelta.adapters_store.packed import (
    PackedBias,
    PackedDelta,
    PackedInputScale,
    PackedNorm,
    vector_view,
)
from polydelta.engine.delta_views import PackedAdd, PackedChange, add_weights, change_weights
from polydelta.kernels.ops import AddDelta, ChangeOutput, Kernels, Linear


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of y, start : start + count, and a vector for them."""

    start: int
    count: int
    # [count], or [in] where it scales the input of these outputs; float32
    vector: Tensor


@dataclass(eq=False)
class LinearDeltas:
    """In the order in which they are applied: see `adapters_store/linear_deltas.py`."""

    # [in] float32: what the base's input is multiplied with
    input_scale: Tensor | None = None
    # The same for some outputs only, which must be computed once more.
    part_scales: list[Columns] = field(default_factory=list)
    changes: list[ChangeOutput] = field(default_factory=list)
    adds: list[AddDelta] = field(default_factory=list)
    biases: list[Columns] = field(default_factory=list)

    def apply(self, y: Tensor, x: Tensor, weight: float, base: Linear) -> None:
        """y `[rows, out]`: the base's product of x `[rows, in]`, times `input_scale`, changed in
        place. weight: the adapter's in a sum, of what it adds."""
        for part in self.part_scales:
            again = base((x * part.vector).to(x.dtype)).narrow(1, part.start, part.count)
            y.narrow(1, part.start, part.count).copy_(again)
        for change in self.changes:
            change(y)
        if self.adds:
            # What can be in a sum is linear in x, so that the weight may be taken there.
            inputs = x if weight == 1.0 else x * weight
            for add in self.adds:
                add(y, inputs)
        for bias in self.biases:
            y.narrow(1, bias.start, bias.count).add_(bias.vector, alpha=weight)


def bind_linears(
    deltas: Iterable[PackedDelta], data: Tensor, dtype: torch.dtype, kernels: Kernels
) -> dict[int, LinearDeltas]:
    """By index of the linear layer. data: the layer's bytes in the pool; dtype: the adapter's."""
    bound: defaultdict[int, LinearDeltas] = defaultdict(LinearDeltas)
    for delta in deltas:
        match delta:
            case PackedInputScale() if delta.whole:
                bound[delta.linear].input_scale = vector_view(data, delta.vector)
            case PackedInputScale():
                vector = vector_view(data, delta.vector)
                part = Columns(delta.out_start, delta.out_features, vector)
                bound[delta.linear].part_scales.append(part)
            case PackedBias():
                vector = vector_view(data, delta.vector)
                part = Columns(delta.out_start, len(vector), vector)
                bound[delta.linear].biases.append(part)
            case _ if isinstance(delta, PackedChange):
                change = kernels.change_output(change_weights(delta, data))
                bound[delta.linear].changes.append(change)
            case _ if isinstance(delta, PackedAdd):
                add = kernels.add_delta(add_weights(delta, data, dtype))
                bound[delta.linear].adds.append(add)
    return dict(bound)


def bind_norms(deltas: Iterable[PackedDelta], data: Tensor) -> dict[int, Tensor]:
    """Replaced weights of norms, by index of the norm."""
    return {
        delta.norm: vector_view(data, delta.weight)
        for delta in deltas
        if isinstance(delta, PackedNorm)
    }
