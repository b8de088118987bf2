"""A weighted sum of adapters, computed unmerged: `y = W x + sum of weight_i * dW_i x`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from polydelta.adapters_store.delta_kinds import ADDABLE, NOT_SERVED
from polydelta.adapters_store.errors import CompositionError, UnknownAdapterError
from polydelta.adapters_store.reference import AdapterRef

MAX_SHARES = 8


@dataclass(frozen=True)
class Share:
    """One adapter's part in a sum."""

    ref: AdapterRef
    weight: float = 1.0

    @property
    def name(self) -> str:
        """`id@version`, and `*weight` where it is not 1."""
        return self.ref.name if self.weight == 1.0 else f"{self.ref.name}*{self.weight!r}"


# Empty for the bare base model; in the order of names.
Shares = tuple[Share, ...]


def combine(shares: Iterable[Share]) -> Shares:
    """The sum as it is computed: a version that is named twice gets the sum of its weights, what
    has the weight 0 falls out. Equal sums come out equal, however they were written.

    Raises CompositionError for too many shares, or for a weight that is not finite.
    """
    weights: dict[AdapterRef, list[float]] = {}
    for share in shares:
        weights.setdefault(share.ref, []).append(share.weight)
    if len(weights) > MAX_SHARES:
        raise CompositionError(
            f"adapters: a sum has at most {MAX_SHARES} adapters, here are {len(weights)} (those of "
            "saved compositions counted one by one): merge some with `polydelta adapters merge`."
        )
    totals = {ref: _total(each) for ref, each in weights.items()}
    for weight in totals.values():
        # Without its name: it may be a saved composition's part, which not everybody knows of.
        if not math.isfinite(weight):
            raise CompositionError(
                f"adapters: the weights of one adapter come to {weight}, which is not finite."
            )
    kept = [Share(ref, weight) for ref, weight in totals.items() if weight != 0.0]
    return tuple(sorted(kept, key=lambda share: share.ref.name))


def part_gone() -> UnknownAdapterError:
    """Without its name, for the same reason as above."""
    return UnknownAdapterError("compose: a part has been deleted meanwhile; ask again without it.")


def _total(weights: Iterable[float]) -> float:
    """The sum, rounded once, so that it is the same in any order."""
    try:
        return math.fsum(weights)
    except (OverflowError, ValueError):  # beyond what a float holds, or infinities that meet
        return math.nan


def check_addable(name: str, kinds: Collection[str]) -> None:
    """Raises CompositionError when an adapter has kinds whose weighted sum is not defined."""
    others = sorted(set(kinds) - ADDABLE)
    if others:
        raise CompositionError(
            f"adapters: {name!r} has deltas of kind {', '.join(others)}, which can be neither "
            f"weighted nor added to others (only {', '.join(sorted(ADDABLE - NOT_SERVED))} can): "
            "use it alone with weight 1, by the field `model`."
        )


def sum_digest(parts: Collection[tuple[str, float]]) -> str:
    """What a sum is known by, from (digest, weight) of its parts in any order; that of a single
    part with weight 1 is the part's own, so that both share a prefix cache."""
    if len(parts) == 1:
        ((digest, weight),) = parts
        if weight == 1.0:
            return digest
    text = "\n".join(f"{digest} {weight!r}" for digest, weight in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()
