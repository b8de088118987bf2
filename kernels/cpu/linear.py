"""Dense linear layers on a CPU, with weights packed once for oneDNN.

On a 2-core Zen 5, 16 tokens, bfloat16, packing makes a 3072 x 576 layer 1.6 times faster (193 ->
123 us), and 2.8 times in float32 (654 -> 230 us).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.kernels.ops import Linear

# Rows that the packed layout is chosen for: a full decode batch.
PACKED_FOR_ROWS = 16


def packed_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """`x @ weight.T + bias` for weight `[out, in]`."""
    if not torch.backends.mkldnn.is_available():
        return lambda x: torch.nn.functional.linear(x, weight, bias)
    with torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: Tensor) -> Tensor:
        y: Tensor = multiply(x, packed, bias, "none", [], "")
        return y

    return linear
