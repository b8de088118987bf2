"""Observations in buckets, as Prometheus has them. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Distribution:
    """How observations spread over buckets."""

    # Upper bounds, ascending; a value that equals one is within it.
    bounds: tuple[float, ...]
    # Of each bucket alone, and at the end of what is beyond the last bound.
    counts: tuple[int, ...]
    # Of all observed values.
    total: float

    @property
    def num(self) -> int:
        return sum(self.counts)


class Histogram:
    """Grows on one thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def distribution(self) -> Distribution:
        """As it is now."""
        return Distribution(self._bounds, tuple(self._counts), self._total)
