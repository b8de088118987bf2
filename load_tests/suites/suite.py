"""What a suite is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from load_tests.comparisons import Comparison, in_turn
from load_tests.replay import Replay
from load_tests.run import Run

# One eighth of S-LoRA's: shortest, and one more than the longest.
LENGTHS = (8, 64)


@dataclass(frozen=True)
class Suite:
    """Runs that belong together, in their order."""

    about: str
    runs: tuple[Run, ...]
    # What is to be read from the runs. Those of a comparison stand several times in `runs`.
    comparisons: tuple[Comparison, ...] = ()

    def only(self, text: str) -> Suite:
        """The runs whose names have it in them; of a suite that compares, the comparisons."""
        if self.comparisons:
            return comparing(self.about, [one for one in self.comparisons if text in one.name])
        return replace(self, runs=tuple(run for run in self.runs if text in run.name))

    def replaying(self, trace: Path) -> Suite:
        """The same runs with as many requests, which come from a trace file."""
        runs = []
        for run in self.runs:
            old = run.workload
            workload = Replay(trace, old.duration, old.adapters, count=len(old.requests()))
            runs.append(replace(run, workload=workload))
        return replace(self, runs=tuple(runs))


def comparing(about: str, comparisons: Sequence[Comparison]) -> Suite:
    """A suite of the runs that these compare."""
    return Suite(about, tuple(in_turn(comparisons)), tuple(comparisons))
