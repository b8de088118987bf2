"""A fixed rotation of heads, before keys are stored in few bits (QuaRot, arXiv:2404.00456).

Some channels of keys are far larger than the others, in every token; a Hadamard matrix spreads each
over all. Queries are rotated alike, so scores are what they were.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def rotated(heads: Tensor) -> Tensor:
    """heads: `[tokens, heads, head_dim]` -> the same shape and dtype. A head is rotated in parts of
    the largest power of two that divides head_dim; twice, it is as it was but for rounding."""
    matrix = hadamard(part(heads.shape[-1]), heads.device)
    # In float64 sums of numbers of half precision are as good as exact, so a row is rounded alike
    # in any order, whoever is multiplied with it.
    turned: Tensor = heads.double().unflatten(-1, (-1, len(matrix))) @ matrix
    return turned.mul_(1 / len(matrix) ** 0.5).flatten(-2).to(heads.dtype)


def part(head_dim: int) -> int:
    """The largest power of two that divides it."""
    return head_dim & -head_dim


@cache
def hadamard(size: int, device: torch.device | None = None) -> Tensor:
    """Sylvester's, of ones and minus ones, `[size, size]` float64; size: a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix
