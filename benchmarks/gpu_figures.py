"""What was measured on a GPU, beside what it could be at best and what was hoped for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

# A bfloat16 has 8 bits of a number; results are rounded to it, and some of what they are made of.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Figure:
    """One measurement. What it lacks was not measured, or has no meaning for it."""

    name: str
    seconds: float | None = None
    # The least seconds, at the speeds that were measured in the same run.
    floor: float | None = None
    # The share of the floor in the time that is hoped for.
    aim: float | None = None
    # The largest difference to the reference, beside the reference's largest number.
    error: float | None = None
    # Whether both sides of a comparison gave the same.
    agrees: bool | None = None
    # Whether the table at the end has it in any case.
    main: bool = False
    # Whatever else there is to know, as JSON has it.
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Of the floor in the time: 1 is as fast as can be. None, too, where a difference of two
        times came out below 0."""
        if self.seconds is None or self.floor is None or self.seconds <= 0:
            return None
        return self.floor / self.seconds

    @property
    def met(self) -> bool | None:
        """Whether it is right, and as fast as hoped for; None where neither was asked."""
        checks = []
        if self.aim is not None:
            checks.append(self.share is None or self.share >= self.aim)
        if self.error is not None:
            # Not a number is not small, either.
            checks.append(self.error <= TOLERANCE)
        if self.agrees is not None:
            checks.append(self.agrees)
        return all(checks) if checks else None

    @property
    def is_wrong(self) -> bool:
        """Whether it differs from the reference, however fast it is."""
        # Not a number is not small, either.
        return self.agrees is False or (self.error is not None and not self.error <= TOLERANCE)

    @property
    def is_main(self) -> bool:
        """Whether the table at the end has it: what has an aim, or is wrong."""
        return self.main or self.aim is not None or self.met is False

    def without_times(self) -> Figure:
        """Those of Triton's interpreter mean nothing, nor do facts about them."""
        if self.seconds is None:
            return self
        return replace(self, seconds=None, floor=None, aim=None, facts={})

    def to_json(self) -> dict[str, Any]:
        json: dict[str, Any] = {"name": self.name}
        if self.seconds is not None:
            json["us"] = round(self.seconds * 1e6, 2)
        if self.floor is not None:
            json["floor_us"] = round(self.floor * 1e6, 2)
        if self.share is not None:
            json["share_of_floor"] = round(self.share, 3)
        if self.aim is not None:
            json["aim"] = round(self.aim, 3)
        if self.error is not None:
            json["relative_error"] = float(f"{self.error:.2g}")
        if self.agrees is not None:
            json["agrees"] = self.agrees
        return json | {"met": self.met} | self.facts

    def cells(self) -> list[str]:
        """As `COLUMNS`."""
        reached = "" if self.share is None else f"{self.share:.0%}"
        colour = {None: "default", True: "green", False: "red"}[self.met]
        verdict = "" if self.agrees is None else "same" if self.agrees else "differs"
        return [
            escape(self.name),
            shown_seconds(self.seconds),
            shown_seconds(self.floor),
            f"[{colour}]{reached or verdict}[/]",
            "" if self.aim is None else f"{self.aim:.0%}",
            "" if self.error is None else f"{self.error:.1e}",
        ]


COLUMNS = ("", "time", "floor", "reached", "aim", "error")


@dataclass
class Section:
    """Figures that belong together, up to where something failed."""

    name: str
    figures: list[Figure] = field(default_factory=list)
    # What failed, with the end of its traceback.
    error: str | None = None
    # The whole section, compiling included.
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "section": self.name,
            "seconds": round(self.seconds, 1),
            "error": self.error,
            "figures": [figure.to_json() for figure in self.figures],
        }


def shown_seconds(seconds: float | None) -> str:
    """With a unit that suits it."""
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def show(sections: Sequence[Section], title: str) -> Table:
    """What has an aim, what is wrong, and what failed."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if not column else "right")
    for section in sections:
        mains = [figure for figure in section.figures if figure.is_main]
        for figure in mains:
            table.add_row(*figure.cells())
        rest = len(section.figures) - len(mains)
        if section.error is not None:
            last = section.error.strip().splitlines()[-1]
            table.add_row(f"[red]{section.name} failed: {escape(last)}[/]")
        elif rest:
            table.add_row(f"[dim]{section.name}: {rest} more are in order[/]")
        table.add_section()
    return table
