"""Dense linear layers on a CPU, with weights packed once for oneDNN.

On a 2-core Zen 5, 16 tokens, bfloat16, packing makes a 3072 x 576 layer 1.6 times faster (193 ->
123 us), and 2.8 times in float32 (654 -> 230 us).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.kernels.cpu import fusing
from polydelta.kernels.cpu.native import NativeLibrary
from polydelta.kernels.cpu.packed_layout import OneDnnPacking
from polydelta.kernels.delta_weights import LowRankWeights, SparseWeights
from polydelta.kernels.fusing import FusableWeight, Fused


class PackedLinear(FusableWeight):
    """`x @ weight.T + bias` for weight `[out, in]`. Needs torch's mkldnn backend."""

    def __init__(self, weight: Tensor, bias: Tensor | None, library: NativeLibrary | None) -> None:
        self._packing = OneDnnPacking(weight.shape, weight.dtype)
        super().__init__(self._packing.pack(weight))
        self._bias = bias
        self._library = library
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._multiply(x, self.weight, self._bias, "none", [], "")
        return y

    def prepare(self, deltas: Sequence[LowRankWeights | SparseWeights]) -> Fused:
        return fusing.prepare(self, self._packing, deltas, self._library)
