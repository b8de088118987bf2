"""The formats of GGUF that are kept as they are when weights are quantised."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from polydelta.engine.models.gguf_head import GgufTensor
from polydelta.kernels.quantized_weight import GROUP, QuantizedWeight

# Bytes of a float16.
_HALF = 2


def quantized_weight(tensor: GgufTensor) -> QuantizedWeight | None:
    """The codes and scales of a matrix in Q8_0, Q4_0 or Q4_1; None for any other.

    All have blocks of GROUP columns: a scale, in Q4_1 the least value, and the codes, of 4 bits
    first the low halves of all bytes and then the high ones. Q4_0 counts from -8.
    """
    if len(tensor.shape) != 2:
        return None
    match tensor.kind:
        case GGMLQuantizationType.Q8_0:
            scales, codes = _split(tensor, 1)
            return QuantizedWeight(codes.view(torch.int8).flatten(1), scales[..., 0], None)
        case GGMLQuantizationType.Q4_0:
            scales, codes = _split(tensor, 1)
            return QuantizedWeight(_nibbles(codes), scales[..., 0], scales[..., 0] * -8)
        case GGMLQuantizationType.Q4_1:
            scales, codes = _split(tensor, 2)
            return QuantizedWeight(_nibbles(codes), scales[..., 0], scales[..., 1])
        case _:
            return None


def _split(tensor: GgufTensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers `[out, groups, count]` float16, and what is behind them in each block,
    `[out, groups, bytes]` uint8."""
    out_features, in_features = tensor.shape
    blocks = tensor.data.reshape(out_features, in_features // GROUP, -1)
    numbers = np.array(blocks[..., : count * _HALF]).view(np.float16)
    codes = np.array(blocks[..., count * _HALF :])
    return torch.from_numpy(numbers), torch.from_numpy(codes)


def _nibbles(codes: Tensor) -> Tensor:
    """`[out, groups, GROUP / 2]` -> `[out, in]`."""
    return torch.cat((codes & 15, codes >> 4), -1).flatten(1)
