"""Results that are small enough to be committed.

What stays of a request are its times, to the millisecond, without its lengths and its adapter,
which the workload's seed draws again; of the server's series a sample every few seconds. The page
can be made from them, without the panel on single adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from load_tests.comparisons import Compared
from load_tests.results import to_json

Result = Mapping[str, Any]

# Digits after the point that each column of the requests keeps; seconds.
DIGITS = {"scheduled": 2, "first_token": 3, "per_token": 4, "total": 2}
# Scrapes of which one stays.
EVERY = 8


def write_brief(
    path: Path, suite: str, results: Iterable[Result], compared: Iterable[Compared]
) -> None:
    """A line for each comparison, then one for each run."""
    lines = [*(one.to_json(suite) for one in compared), *map(brief, results)]
    path.write_text("".join(to_json(line, separators=(",", ":")) + "\n" for line in lines))


def brief(result: Result) -> dict[str, Any]:
    """What is kept of a result."""
    requests = {name: _rounded(result["requests"][name], digits) for name, digits in DIGITS.items()}
    series = {name: _thinned(values) for name, values in result["series"].items()}
    return {**result, "requests": requests, "services": [], "series": series}


def _rounded(column: Sequence[float | None], digits: int) -> list[float | None]:
    return [None if one is None else round(one, digits) for one in column]


def _thinned(values: Sequence[float]) -> list[float]:
    """The last one stays: counters have their growth in it."""
    kept = [*values[:-1:EVERY], *values[-1:]]
    return [round(one, 1) for one in kept]
