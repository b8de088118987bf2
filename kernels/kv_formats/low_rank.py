"""Matrices of low rank near to others, the same bits in every batch and on every device."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor

from polydelta.kernels.kv_formats.codes import half

# GEAR's.
_ITERATIONS = 3


def low_rank(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors by power iteration, as GEAR finds them (arXiv:2403.05527), but one after the
    other, each of what those before it leave.

    matrices: `[batch, n, m]` float32, finite -> `[batch, n, rank]`, of length 1 or 0, and
    `[batch, rank, m]`, both float16.

    Libraries sum up products in an order that depends on the batch. Here no order matters: all is
    whole numbers, of so few bits that float64 holds every sum exactly.
    """
    bits = (52 - max(matrices.shape[-2:]).bit_length()) // 2
    rest = matrices.double().contiguous()
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    for _ in range(rank):
        whole, unit = _whole(rest, bits)
        # Begun with the longest row, which nothing that matters is at right angles to.
        longest = (whole * whole).sum(-1, keepdim=True).argmax(-2, keepdim=True)
        right = whole.gather(-2, longest.expand(-1, -1, whole.shape[-1]))
        for _ in range(_ITERATIONS):
            # [batch, n, 1]
            left, _ = _whole(whole.bmm(right.mT), bits)
            # [batch, 1, m]
            exact = left.mT.bmm(whole)
            right, _ = _whole(exact, bits)
        length = left.mT.bmm(left).clamp(min=1.0).sqrt()
        lefts.append(left / length)
        rights.append(exact / length * unit)
        rest = rest - lefts[-1] * rights[-1]
    return half(torch.cat(lefts, -1)), half(torch.cat(rights, -2))


def product(left: Tensor, right: Tensor) -> Tensor:
    """`[..., n, rank]` and `[..., rank, m]` -> `[..., n, m]` float32."""
    pairs = zip(left.float().unbind(-1), right.float().unbind(-2), strict=True)
    return functools.reduce(operator.add, (a[..., None] * b[..., None, :] for a, b in pairs))


def _whole(numbers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers in proportion to these, `2 ** bits` for the largest of each of the batch; and
    what one of them is worth, `[batch, 1, 1]`."""
    unit = numbers.abs().amax((-1, -2), keepdim=True) / 2**bits
    # No unit of numbers that were float32 is as small.
    return (numbers / unit.clamp(min=1e-300)).round_(), unit
