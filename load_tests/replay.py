"""Requests of a trace that somebody recorded, fitted to a duration and a number of adapters.

A trace is a file with one request a line: JSON objects (`.jsonl`), or `.csv` with a head line. The
fields, whatever else there is:

    timestamp       when it came, in seconds from any beginning
    model           which model or adapter was asked for: any text
    prompt_tokens   length of the prompt
    output_tokens   length of the answer

Lines may come in any order. As S-LoRA does with LMSYS' conversations, requests are drawn from the
trace, the models that they name become adapters, and the time from the first to the last becomes
the duration.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from load_tests.workload import Request


@dataclass(frozen=True)
class Recorded:
    """One line of a trace."""

    timestamp: float
    model: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Replay:
    """The requests of a trace file, in their order and with their spacing."""

    path: Path
    # Seconds from the first request to the last.
    duration: float
    # The model that is named most often is adapter 0, and so on; what is beyond the last adapter
    # begins at 0 again.
    adapters: int
    # So many requests are drawn from the trace, none twice; None takes all.
    count: int | None = None
    # One more than the longest prompt and output; requests with longer ones are left out.
    prompt_limit: int = 512
    output_limit: int = 512
    # Of the draw.
    seed: int = 42

    def requests(self) -> list[Request]:
        """Raises ValueError for a file that is no trace, or has too few requests."""
        kept = self._draw([one for one in read_trace(self.path) if self._fits(one)])
        kept.sort(key=lambda one: one.timestamp)
        first, last = kept[0].timestamp, kept[-1].timestamp
        scale = self.duration / (last - first) if last > first else 0.0
        places = _by_frequency(kept)
        return [
            Request(
                (one.timestamp - first) * scale,
                places[one.model] % self.adapters if self.adapters else None,
                one.prompt_tokens,
                one.output_tokens,
            )
            for one in kept
        ]

    def _fits(self, one: Recorded) -> bool:
        return one.prompt_tokens < self.prompt_limit and one.output_tokens < self.output_limit

    def _draw(self, recorded: list[Recorded]) -> list[Recorded]:
        wanted = len(recorded) if self.count is None else self.count
        if not 0 < wanted <= len(recorded):
            raise ValueError(
                f"{self.path} has {len(recorded)} requests that are short enough, and"
                f" {wanted or 'some'} are to be replayed."
            )
        if self.count is None:
            return recorded
        chosen = np.random.RandomState(self.seed).choice(len(recorded), wanted, replace=False)
        return [recorded[place] for place in chosen]


def read_trace(path: Path) -> list[Recorded]:
    """Raises ValueError, with the line's number, for one that cannot be read."""
    recorded = []
    with path.open(newline="") as file:
        lines = csv.DictReader(file) if path.suffix == ".csv" else _json_lines(file)
        for number, line in enumerate(lines, start=1):
            try:
                recorded.append(_read(line))
            except (KeyError, TypeError, ValueError) as problem:
                raise ValueError(f"{path}, request {number}: {problem!r}") from problem
    return recorded


def _json_lines(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    return (json.loads(line) for line in lines if line.strip())


def _read(line: Mapping[str, Any]) -> Recorded:
    one = Recorded(
        float(line["timestamp"]),
        str(line["model"]),
        int(line["prompt_tokens"]),
        int(line["output_tokens"]),
    )
    if one.prompt_tokens < 1 or one.output_tokens < 1:
        raise ValueError("a length below 1")
    return one


def _by_frequency(recorded: Sequence[Recorded]) -> dict[str, int]:
    """Model -> its place among all; of models that are named equally often, by name."""
    counts = Counter(one.model for one in recorded)
    ranked = sorted(counts, key=lambda model: (-counts[model], model))
    return {model: place for place, model in enumerate(ranked)}
