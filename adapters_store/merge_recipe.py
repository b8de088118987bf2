"""How adapters are to be merged, checked before any weight is read.

Imports no torch, so that the command line's help does not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from polydelta.adapters_store.errors import CompositionError

MAX_SEED = 2**63 - 1


class Method(StrEnum):
    """What becomes of each adapter's `dW`, and how they are then put together.

    An adapter's change is first thinned out: not at all, to its largest entries, or by chance. Then
    all are summed with their weights, or each entry takes the mean of those that agree on its sign.
    """

    # Task arithmetic, arXiv:2212.04089.
    LINEAR = "linear"
    # Largest entries; summed.
    MAGNITUDE = "magnitude"
    # Largest entries; mean of those that agree. arXiv:2306.01708.
    TIES = "ties"
    # By chance; summed. arXiv:2311.03099.
    DARE = "dare"
    # By chance; mean of those that agree.
    DARE_TIES = "dare-ties"

    @property
    def thins(self) -> bool:
        return self is not Method.LINEAR

    @property
    def draws(self) -> bool:
        return self in (Method.DARE, Method.DARE_TIES)

    @property
    def elects(self) -> bool:
        return self in (Method.TIES, Method.DARE_TIES)


class Election(StrEnum):
    """Which sign an entry takes when adapters disagree."""

    # That of the sum of their changes, before weights, as in the paper.
    TOTAL = "total"
    # The one that more of them have; positive in a draw.
    COUNT = "count"


@dataclass(frozen=True)
class MergeRecipe:
    """Everything that decides the result but the adapters and their weights.

    Raises CompositionError for a field that cannot be used.
    """

    method: Method = Method.LINEAR
    # Share of the entries of each dW that stays, zeros counted; None for linear, which keeps all.
    density: float | None = None
    # Of the draws.
    seed: int = 0
    # Of the low-rank result; None leaves an exact result as it is, and otherwise takes the largest
    # rank that goes in.
    rank: int | None = None
    election: Election = Election.TOTAL

    def __post_init__(self) -> None:
        if self.method.thins and self.density is None:
            raise CompositionError(
                f"density is not given, and method {self.method.value!r} needs it: "
                "give the share of entries to keep, such as 0.2."
            )
        if not self.method.thins and self.density is not None:
            raise CompositionError(
                f"density is {self.density}, but method {self.method.value!r} keeps every entry: "
                "leave density out, or take another method."
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise CompositionError(f"density is {self.density}: give a share above 0, up to 1.")
        if not 0 <= self.seed <= MAX_SEED:
            raise CompositionError(f"seed is {self.seed}: give a number from 0 to {MAX_SEED}.")
        if self.rank is not None and self.rank < 1:
            raise CompositionError(f"rank is {self.rank}: give 1 or more, or leave it out.")
        if self.election is Election.COUNT and not self.method.elects:
            raise CompositionError(
                f"election is {self.election.value!r}, but method {self.method.value!r} elects no "
                "signs: leave it out, or take ties or dare-ties."
            )
