"""Dense linear layers in bfloat16 on our own products (`products.c`), weights packed once.

On a 2-core Zen 5 they reach what oneDNN does for a whole prompt (820 GFLOP/s), and for one row the
memory's bandwidth (40 GB/s, where oneDNN reads 28).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.kernels.cpu import fusing
from polydelta.kernels.cpu.native import Field, NativeLibrary, NativePool
from polydelta.kernels.cpu.packed_layout import PackedLayout
from polydelta.kernels.delta_weights import LowRankWeights, SparseWeights
from polydelta.kernels.fusing import FusableWeight, Fused

# Rows of a panel, as in lanes.c.
PANEL = 32


class PanelPacking:
    """Weights `[out, in]` as panels: `[out / PANEL, in / 2, PANEL, 2]`, rounded up with zeros."""

    def __init__(self, pool: NativePool, shape: tuple[int, int]) -> None:
        """shape: `in` is even."""
        self._pool = pool
        self.out_features, self.in_features = shape
        self.layout = PackedLayout(PANEL, 2, self.in_features)

    def pack(self, weight: Tensor) -> Tensor:
        weight = weight.contiguous()
        panels, pairs = -(-self.out_features // PANEL), self.in_features // 2
        packed = torch.empty(panels, pairs, PANEL, 2, dtype=weight.dtype)
        self._pool.call("pack", packed, weight, self.out_features, pairs)
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        rows = packed.transpose(1, 2).reshape(-1, self.in_features)
        return rows[: self.out_features].contiguous()

    def memory(self, packed: Tensor) -> Tensor:
        """All elements, in the order in which they lie."""
        return packed.view(-1)


class PanelLinear(FusableWeight):
    """`x @ weight.T + bias` for bfloat16 x; y is bfloat16, or float32 if `wide`."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        pool: NativePool,
        library: NativeLibrary,
        wide: bool = False,
    ) -> None:
        """weight: `[out, in]`, `in` even; bias: `[out]`."""
        out_features, in_features = weight.shape
        self.packing = PanelPacking(pool, (out_features, in_features))
        super().__init__(self.packing.pack(weight))
        self._bias = None if bias is None else bias.float()
        self._pool = pool
        self._library = library
        self._dtype = torch.float32 if wide else torch.bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        y, fields = self.product(x)
        self._pool.call("multiply", *fields)
        return y

    def product(self, x: Tensor) -> tuple[Tensor, tuple[Field, ...]]:
        """y, and the fields of the struct `Product` that tells how it is computed."""
        rows, in_features = x.shape
        out_features = self.packing.out_features
        y = self._pool.empty(rows, out_features, dtype=self._dtype)
        return y, (
            y,
            out_features,
            x,
            x.stride(0),
            self.weight,
            self._bias,
            rows,
            in_features,
            out_features,
            self._dtype.itemsize > 2,
        )

    def prepare(self, deltas: Sequence[LowRankWeights | SparseWeights]) -> Fused:
        return fusing.prepare(self, self.packing, deltas, self._library)
