"""Figures of two runs, one over the other, and what their ratio is to be.

Runs that are compared take turns, there and back (A B B A), so that a machine that gets slower or
faster on the way does so for both; what counts is the median of the turns' ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load_tests.run import Run

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A figure of one run over that of another."""

    name: str
    # Where it stands in a result's figures: keys with dots between them. What the server counts is
    # below "server_counts".
    figure: str
    run: Run
    # None: the figure is taken as it is.
    against: Run | None
    # What the ratio is to be; neither: it is only told.
    at_least: float | None = None
    at_most: float | None = None
    # How often each of the runs is made.
    turns: int = 2

    @property
    def runs(self) -> tuple[Run, ...]:
        return (self.run,) if self.against is None else (self.run, self.against)

    @property
    def bar(self) -> str:
        """As text; empty if there is none."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"

    def meets(self, ratio: float) -> bool | None:
        """None where there is no bar."""
        if self.at_least is not None:
            return ratio >= self.at_least
        return None if self.at_most is None else ratio <= self.at_most


def in_turn(comparisons: Sequence[Comparison]) -> list[Run]:
    """The runs, each as often as its comparisons want it: those that are compared, also by way of
    others, there and back, as often as it takes."""
    runs = []
    for group in _groups(comparisons):
        members = list(dict.fromkeys(run for one in group for run in one.runs))
        for turn in range(max(one.turns for one in group)):
            runs += members[::-1] if turn % 2 else members
    return runs


def _groups(comparisons: Iterable[Comparison]) -> list[list[Comparison]]:
    """Comparisons that have a run in common, be it through others."""
    groups: list[list[Comparison]] = []
    for one in comparisons:
        related = [group for group in groups if any(_related(one, other) for other in group)]
        groups = [group for group in groups if group not in related]
        groups.append([each for group in related for each in group] + [one])
    return groups


def _related(one: Comparison, other: Comparison) -> bool:
    return not set(one.runs).isdisjoint(other.runs)


@dataclass(frozen=True)
class Compared:
    """A comparison and what came of it."""

    comparison: Comparison
    # The figure, a value for each turn.
    values: tuple[float, ...]
    # Of the other run; empty if there is none.
    against: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """One for each turn."""
        if self.comparison.against is None:
            return self.values
        return tuple(
            value / other if other else float("inf")
            for value, other in zip(self.values, self.against, strict=True)
        )

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """None where there is no bar."""
        return self.comparison.meets(self.ratio)

    def to_json(self, suite: str) -> dict[str, Any]:
        """A line of a results file."""
        one = self.comparison
        return {
            "suite": suite,
            "comparison": one.name,
            "figure": one.figure,
            "run": one.run.name,
            "against": None if one.against is None else one.against.name,
            "values": list(self.values),
            "against_values": list(self.against),
            # JSON has no infinity.
            "ratios": [round(each, 4) if each != float("inf") else None for each in self.ratios],
            "ratio": round(self.ratio, 4) if self.ratio != float("inf") else None,
            "bar": one.bar,
            "met": self.met,
        }


def compare(comparisons: Iterable[Comparison], results: Sequence[Result]) -> list[Compared]:
    """Those of which there are results. The first result of one run is taken with the first of the
    other, and so on; a turn in which one of them has no such figure counts for neither."""
    found = []
    for one in comparisons:
        sides = [_figures(one.figure, run.name, results) for run in one.runs]
        turns = [turn for turn in zip(*sides, strict=False) if None not in turn]
        if turns:
            values, *others = zip(*turns, strict=True)
            found.append(Compared(one, values, others[0] if others else ()))
    return found


def _figures(figure: str, run: str, results: Sequence[Result]) -> list[float | None]:
    """Of each result of a run; None where there is none, as of a run that served nothing."""
    found = []
    for one in results:
        if one["run"] == run:
            value: Any = {**one["figures"], "server_counts": one.get("server_counts")}
            for key in figure.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            found.append(value)
    return found
