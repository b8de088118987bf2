"""Rotations made of skew-symmetric matrices, as PEFT makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError


def skew_symmetric(triangle: Tensor, size: int) -> Tensor:
    """`[..., size * (size - 1) / 2]`, row by row what is above the diagonal -> `[..., size,
    size]`."""
    rows, columns = torch.triu_indices(size, size, 1)
    upper = torch.zeros(*triangle.shape[:-1], size, size)
    upper[..., rows, columns] = triangle
    return upper - upper.mT


def cayley(skew: Tensor) -> Tensor:
    """`(I - skew) (I + skew)^-1`, which is orthogonal, of each matrix: `[..., size, size]`.

    Raises InvalidAdapterError where numbers are beyond what float32 holds.
    """
    identity = torch.eye(skew.shape[-1])
    rotations: Tensor
    rotations, failed = torch.linalg.solve_ex(identity + skew, identity - skew, left=False)
    if failed.any():
        raise InvalidAdapterError(
            "The adapter has numbers so large that no rotation can be made of them: take an "
            "earlier checkpoint."
        )
    return rotations


def cayley_series(skew: Tensor, terms: int) -> Tensor:
    """A sum of powers in place of `cayley(-skew)`: `I + 2 Q + 2 Q^2 + ...`.

    The last power is taken once, and comes after Q^2 even where that is more than the terms asked
    for: 3 are what 4 are.
    """
    identity = torch.eye(skew.shape[-1]).expand_as(skew)
    if terms <= 2:
        return identity + 2 * skew if terms == 2 else identity
    total, power = identity + 2 * skew, skew
    for _ in range(max(terms, 4) - 3):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew
