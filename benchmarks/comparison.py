"""Rows of a comparison: the same work on two sides that take turns, beside the floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.floor import Work, floor_of
from benchmarks.http_bench import busy
from benchmarks.machine_speed import MachineSpeed
from benchmarks.sides import Side
from polydelta.engine.models.config import ModelConfig

# New tokens when a side warms up.
WARMING = 2
# Names of sides.
PEFT, ENGINE, WITH_ADAPTERS = "PEFT", "engine", "engine that has used adapters"


@dataclass
class Row:
    """One piece of work, and the seconds that each round of it took on both sides."""

    name: str
    work: Work
    ours: str
    theirs: str
    rounds: int
    # The ratio that must be reached, and the one that is hoped for: both or none.
    bar: float | None = None
    aim: float | None = None
    # Processes that spin meanwhile, each on a core.
    busy: int = 0
    our_seconds: list[float] = field(default_factory=list)
    their_seconds: list[float] = field(default_factory=list)
    # Share of the prompts whose first new token is the same on both sides.
    first_token_agreement: float = 0.0

    @property
    def ours_per_second(self) -> float:
        """Output tokens, by the median round."""
        return self.work.tokens / statistics.median(self.our_seconds)

    @property
    def theirs_per_second(self) -> float:
        return self.work.tokens / statistics.median(self.their_seconds)

    @property
    def ratio(self) -> float:
        return self.ours_per_second / self.theirs_per_second

    @property
    def shown_ratio(self) -> str:
        if self.bar is None:
            return f"{self.ratio:.2f}x"
        return f"[{'green' if self.ratio >= self.bar else 'red'}]{self.ratio:.2f}x[/]"

    def names(self, adapters: Sequence[str]) -> list[str | None]:
        """The adapter of each prompt."""
        chosen = adapters[: len(self.work.ranks)]
        return [chosen[row % len(chosen)] if chosen else None for row in range(self.work.batch)]

    def to_json(self, floor: float) -> dict[str, Any]:
        """floor: tokens a second."""
        return {
            "row": self.name,
            "work": asdict(self.work),
            "busy_processes": self.busy,
            "ours": self.ours,
            "ours_tokens_per_second": round(self.ours_per_second, 1),
            "theirs": self.theirs,
            "theirs_tokens_per_second": round(self.theirs_per_second, 1),
            "ratio": round(self.ratio, 3),
            "bar": self.bar,
            "aim": self.aim,
            "floor_tokens_per_second": round(floor, 1),
            "share_of_floor": round(self.ours_per_second / floor, 3),
            "first_token_agreement": round(self.first_token_agreement, 3),
            "rounds": self.rounds,
            "ours_seconds": [round(seconds, 3) for seconds in self.our_seconds],
            "theirs_seconds": [round(seconds, 3) for seconds in self.their_seconds],
        }


def measure(
    row: Row, sides: Mapping[str, Side], adapters: Sequence[str], advance: Callable[[], None]
) -> None:
    """Both sides warm up, then take turns, and begin in turn: a machine that drifts drifts for
    both. advance: called after each round."""
    random, names = Random(0), row.names(adapters)
    prompts = [[random.randrange(100, 40000) for _ in range(row.work.prompt_tokens)] for _ in names]
    ours, theirs = sides[row.ours], sides[row.theirs]
    for side in (theirs, ours):
        side.run(prompts, names, WARMING)
    with ExitStack() as stack:
        stack.enter_context(busy(row.busy))
        for number in range(row.rounds):
            first: dict[str, list[int]] = {}
            turns = [(row.ours, ours, row.our_seconds), (row.theirs, theirs, row.their_seconds)]
            for name, side, took in turns if number % 2 else reversed(turns):
                seconds, tokens = side.run(prompts, names, row.work.new_tokens)
                took.append(seconds)
                first[name] = [new[0] for new in tokens]
            same = [a == b for a, b in zip(first[row.ours], first[row.theirs], strict=True)]
            row.first_token_agreement = sum(same) / len(same)
            advance()


def floors(rows: Sequence[Row], model: ModelConfig, speed: MachineSpeed) -> dict[str, float]:
    """Row -> tokens a second at the floor."""
    return {row.name: floor_of(model, row.work, speed).tokens_per_second for row in rows}


def show(
    rows: Sequence[Row],
    floor: Mapping[str, float],
    http: Mapping[str, float] | None = None,
) -> Table:
    """The summary. http: row -> tokens a second over HTTP."""
    table = Table(title="Output tokens a second, bfloat16", box=box.SIMPLE_HEAD)
    columns = ["", "PEFT", "ours", "ratio", "bar, aim", "floor", "reached"]
    for column in [*columns, *(["HTTP"] if http else [])]:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        cells = [
            row.name,
            f"{row.theirs_per_second:.0f}" if row.theirs == PEFT else "",
            f"{row.ours_per_second:.0f}",
            row.shown_ratio,
            f"{row.bar:g}, {row.aim:g}" if row.bar else "",
            f"{floor[row.name]:.0f}",
            f"{row.ours_per_second / floor[row.name]:.0%}",
        ]
        if http:
            cells.append(f"{http[row.name]:.0f}" if row.name in http else "")
        table.add_row(*cells)
    table.caption = "ratio: to PEFT; adapters on: to an engine that has seen none"
    return table
