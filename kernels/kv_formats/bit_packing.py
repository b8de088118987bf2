"""Small numbers in the bits of bytes: the first of a byte's are in its lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: `[..., n]`, each below `2 ** bits`, of any dtype but bool -> `[..., n * bits / 8]`
    uint8. Number i is at bit `i * bits % 8` of byte `i * bits // 8`."""
    inside = codes.to(torch.uint8).unflatten(-1, (-1, 8 // bits))
    packed: Tensor = inside[..., 0]
    for place in range(1, 8 // bits):
        packed = packed | (inside[..., place] << (place * bits))
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack`: `[..., m]` uint8 -> `[..., m * 8 / bits]` uint8."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)
