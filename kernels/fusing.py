"""Fused mode: an adapter in the base weights, where every row of a step wants it.

The product then costs what the bare model's costs, and taking the adapter out brings back every bit
(the idea of switching a sparse adapter by its entries alone: SHiRA, arXiv:2406.13175). Which kinds
of layers there are and how they do it is the backends'; here is what they share.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.kernels.delta_weights import LowRankWeights, SparseWeights, dense


class FusableWeight:
    """A layer's weight, and the one delta that may be in it."""

    def __init__(self, base: Tensor) -> None:
        # As loaded; some deltas write into its memory, and restore it.
        self.base = base
        # What the layer multiplies with.
        self.weight = base
        self.fused: Fused | None = None
        # Held while `base` is written, or read elsewhere than in a product.
        self.lock = threading.Lock()


class Fused(ABC):
    """A delta of one layer that is in its weight, or out of it (`ops.FusedDelta`)."""

    def __init__(self, linear: FusableWeight) -> None:
        self._linear = linear

    def fuse(self) -> None:
        with self._linear.lock:
            if self._linear.fused is not None:
                raise RuntimeError("A delta is in this layer's weight already: take it out first.")
            self._put_in()
            self._linear.fused = self

    def unfuse(self) -> None:
        with self._linear.lock:
            if self._linear.fused is not self:
                raise RuntimeError("This delta is not in the layer's weight.")
            self._take_out()
            self._linear.fused = None

    @abstractmethod
    def _put_in(self) -> None: ...

    @abstractmethod
    def _take_out(self) -> None: ...


class FusedWeight(Fused):
    """The whole sum, as a weight of its own in the place of the base's, which is not written to.

    Fusing is an assignment. Memory: as much as the layer's weight has, from `prepare` on.
    """

    def __init__(self, linear: FusableWeight, merged: Tensor) -> None:
        super().__init__(linear)
        self._merged = merged

    def _put_in(self) -> None:
        self._linear.weight = self._merged

    def _take_out(self) -> None:
        self._linear.weight = self._linear.base


def with_deltas(weight: Tensor, deltas: Sequence[LowRankWeights | SparseWeights]) -> Tensor:
    """`W + sum of dW` for W `[out, in]`, in float32 or W's dtype if that is wider, rounded once.
    The deltas may be in host memory, wherever W is."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for delta in deltas:
        if isinstance(delta, LowRankWeights):
            all_a = dense(delta.a, total.dtype).to(total)
            for block in delta.blocks:
                b_t = dense(block.b_t, total.dtype).to(total)
                rows = total.narrow(0, block.out_start, b_t.shape[1])
                rows.addmm_(b_t.t(), all_a.narrow(0, block.rank_start, len(b_t)))
        else:
            rows, columns = entry_rows(delta).to(total.device), delta.columns.to(total.device)
            total.index_put_((rows, columns.long()), delta.values.to(total), accumulate=True)
    return total.to(weight.dtype)


def entry_rows(delta: SparseWeights) -> Tensor:
    """The row of each entry, `[nnz]` int64."""
    counts = delta.row_pointers.diff().long()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
