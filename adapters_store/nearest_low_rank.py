"""The nearest change of low rank, by singular value decomposition (Eckart and Young)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Delta, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError

D = TypeVar("D", bound=Delta, covariant=True)


@dataclass(frozen=True)
class Truncation:
    """How much is kept of a change: a rank, or as many singular values as hold a share of the sum
    of their squares."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidAdapterError unless exactly one of the two is given, and makes sense."""
        if (self.rank is None) == (self.energy is None):
            raise InvalidAdapterError("Give a rank or an energy, and not both.")
        if self.rank is not None and self.rank < 1:
            raise InvalidAdapterError(f"rank is {self.rank}: give 1 or more.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InvalidAdapterError(
                f"energy is {self.energy}: give a share above 0, up to 1, such as 0.9."
            )

    def rank_of(self, singular: Tensor) -> int:
        """How many stay of these singular values, `[n]` and descending: 1 at least."""
        if self.rank is not None:
            return min(self.rank, len(singular))
        assert self.energy is not None
        energies = singular.double().square().cumsum(0)
        wanted = energies[-1:] * self.energy
        return min(int(torch.searchsorted(energies, wanted)) + 1, len(singular))


@dataclass(frozen=True, eq=False)
class Approximation(Generic[D]):
    """A change in the place of another."""

    delta: D
    # Frobenius norms of the whole change and of what is left out of it; both 0 for an exact one.
    norm: float = 0.0
    lost: float = 0.0

    @property
    def error(self) -> float:
        """Relative Frobenius error."""
        return self.lost / self.norm if self.norm else 0.0


def total_error(approximations: Iterable[Approximation[Delta]]) -> float:
    """Relative Frobenius error of all of them together."""
    parts = list(approximations)
    norm = math.hypot(*(part.norm for part in parts))
    return math.hypot(*(part.lost for part in parts)) / norm if norm else 0.0


def nearest_low_rank(matrix: Tensor, truncation: Truncation) -> Approximation[LowRank]:
    """matrix: `[out, in]`. Raises FloatingPointError for one that is not finite."""
    if not torch.isfinite(matrix).all():
        raise FloatingPointError("a matrix with infinite entries has no singular values")
    u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = truncation.rank_of(singular)
    # Half of the scale on each side, so that both factors fit into 16 bits equally well.
    root = singular[:rank].sqrt()
    low_rank = LowRank(root.unsqueeze(1) * vh[:rank], u[:, :rank] * root)
    return Approximation(low_rank, float(singular.norm()), float(singular[rank:].norm()))


def nearest_of_product(delta: LowRank, truncation: Truncation) -> Approximation[LowRank]:
    """As `nearest_low_rank`, without the dense matrix: the factors' QR decompositions leave a core
    of the size of their rank, whose singular values are those of `dW`."""
    left, core_b = torch.linalg.qr(delta.b)
    right, core_a = torch.linalg.qr(delta.a.T)
    core = nearest_low_rank(core_b @ core_a.T, truncation)
    factors = LowRank(core.delta.a @ right.T, left @ core.delta.b)
    return Approximation(factors, core.norm, core.lost)
