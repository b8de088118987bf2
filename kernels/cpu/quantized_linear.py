"""Linear layers in bfloat16 with weights of 4 or 8 bits, on our own products (`quantized.c`).

y has the bits that `PanelLinear` gives for the dequantised weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from polydelta.kernels.cpu.native import NativePool
from polydelta.kernels.cpu.panels import PANEL
from polydelta.kernels.quantized_weight import GROUP, QuantizedWeight


class QuantizedLinear:
    """`x @ weight.T + bias` for bfloat16 x; y is bfloat16, or float32 if `wide`."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, pool: NativePool, wide: bool = False
    ) -> None:
        """weight: `[out, in]`, `in` even; bias: `[out]`."""
        self._out_features, _ = weight.shape
        self._bits = weight.bits
        self._weight = pack(weight)
        self._bias = None if bias is None else bias.float()
        self._pool = pool
        self._dtype = torch.float32 if wide else torch.bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        rows, in_features = x.shape
        out_features = self._out_features
        y = self._pool.empty(rows, out_features, dtype=self._dtype)
        self._pool.call(
            "multiply_quantized",
            y,
            out_features,
            x,
            x.stride(0),
            self._weight,
            self._bias,
            rows,
            in_features,
            out_features,
            self._bits,
            self._dtype.itemsize > 2,
        )
        return y


def pack(weight: QuantizedWeight) -> Tensor:
    """The blocks of `quantized.c`: `[panels, groups, bytes]` uint8."""
    halves = [_by_panel(weight.scales)]
    if weight.least is not None:
        halves.append(_by_panel(weight.least))
    codes = _codes_4(weight.codes) if weight.bits == 4 else _codes_8(weight.codes)
    return torch.cat([*(each.view(torch.uint8) for each in halves), codes], -1)


def _by_panel(halves: Tensor) -> Tensor:
    """`[out, groups]` -> `[panels, groups, PANEL]`."""
    groups = halves.shape[1]
    padded = pad(halves, (0, 0, 0, -len(halves) % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def _codes_8(codes: Tensor) -> Tensor:
    """Pairs of columns of one row after the other: `[panels, groups, GROUP * PANEL]`."""
    # panels, rows, groups, pairs, column
    pairs = _padded(codes).view(torch.uint8).view(-1, PANEL, _groups(codes), GROUP // 2, 2)
    return pairs.permute(0, 2, 3, 1, 4).flatten(2)


def _codes_4(codes: Tensor) -> Tensor:
    """Lanes of four bytes: `[panels, groups, GROUP * PANEL / 2]`.

    Two pairs of columns lie in 16 lanes: the two columns of eight rows. The bytes of a lane are the
    first pair's of each half of the panel and the second pair's; eight rows are in the low bits of
    a byte, and the next eight in the high ones.
    """
    # panels, halves, parts, rows, groups, two pairs, pair, column
    split = _padded(codes).view(-1, 2, 2, PANEL // 4, _groups(codes), GROUP // 4, 2, 2)
    both = split[:, :, 0] | split[:, :, 1] << 4
    return both.permute(0, 3, 4, 2, 6, 5, 1).flatten(2)


def _groups(codes: Tensor) -> int:
    return -(-codes.shape[1] // GROUP)


def _padded(codes: Tensor) -> Tensor:
    """Whole panels and groups."""
    out_features, in_features = codes.shape
    return pad(codes, (0, -in_features % GROUP, 0, -out_features % PANEL))
