"""When an adapter goes into the base weights, and when it comes out. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from polydelta.adapters_store.composition import Shares
from polydelta.adapters_store.reference import AdapterRef


class FusionPolicy:
    """Fuses what every sequence of a step uses, once it was so for some steps on end.

    Going in and out costs more than a step saves, so a short visit does not count. A sum of
    adapters, or one with a weight other than 1, stays unmerged.
    """

    def __init__(self, patience: int) -> None:
        """patience: steps that must agree before the one that runs fused; 0 fuses at once."""
        if patience < 0:
            raise ValueError(f"patience {patience} is negative: use 0 steps or more")
        self._patience = patience
        self._only: AdapterRef | None = None
        # How many steps on end it was the only one.
        self._steps = 0

    def wanted(self, running: Iterable[Shares]) -> AdapterRef | None:
        """The adapter to have in the weights for the step at hand; None for the bare base.

        running: the adapters of each of the step's sequences. To be called once a step.
        """
        only = _only_adapter(running)
        if only != self._only:
            self._only, self._steps = only, 0
        self._steps += 1
        return only if self._steps > self._patience else None


def _only_adapter(running: Iterable[Shares]) -> AdapterRef | None:
    """The adapter that all of them use, alone and with weight 1."""
    distinct = set(running)
    if len(distinct) != 1:
        return None
    (shares,) = distinct
    return shares[0].ref if len(shares) == 1 and shares[0].weight == 1.0 else None
