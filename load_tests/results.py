"""One line of a results file: a run's whole configuration, where it ran, and what came of it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load_tests.driver import Record, failures
from load_tests.figures import figures, services
from load_tests.measuring import Outcome
from load_tests.run import Run
from load_tests.scrape import Series
from load_tests.workload import Tenants

ROOT = Path(__file__).parents[1]
SHOWN_FAILURES = 3
# Counters of the server; a result has by how much each grew.
COUNTERS = ("preemptions", "cold_starts", "adapter_loads", "adapter_load_seconds", "evictions")


def describe_run(run: Run) -> dict[str, Any]:
    """The configuration; of the workload its kind, too."""
    return asdict(run) | {"workload": _describe(run.workload)}


def _describe(workload: Any) -> dict[str, Any]:
    found = {"kind": type(workload).__name__} | asdict(workload)
    if isinstance(workload, Tenants):
        return found | {"of": {tenant: _describe(each) for tenant, each in workload.of}}
    for name in ("of", "popularity", "first", "then"):
        if hasattr(workload, name):
            found[name] = _describe(getattr(workload, name))
    return found


def git_revision() -> str | None:
    """Of the tree that this file is in, with a + when it was changed; None where there is none."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ("git", *arguments), cwd=here, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def result(suite: str, run: Run, outcome: Outcome, where: dict[str, Any]) -> dict[str, Any]:
    """where: the server's facts, the machine and the revision."""
    records = outcome.records
    return {
        "suite": suite,
        "run": run.name,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "config": describe_run(run) | {"prompt_seed": outcome.prompt_seed},
        **where,
        "figures": figures(records, run.slo_seconds, run.edge_seconds),
        "server_counts": growth(outcome.series),
        "client_cpu_seconds": round(outcome.client_cpu_seconds, 3),
        "first_failures": list(failures(records))[:SHOWN_FAILURES],
        "requests": _columns(records),
        "services": [
            [one.adapter, one.requests, round(one.service, 4)] for one in services(records)
        ],
        "series": outcome.series.to_json(),
    }


def growth(series: Series) -> dict[str, float]:
    """By how much the server's counters grew in a run."""
    return {
        name: round(values[-1] - values[0], 6)
        for name, values in series.values.items()
        if name.startswith(COUNTERS)
    }


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Every request, a column for each fact; seconds."""
    return {
        "scheduled": [round(one.scheduled, 4) for one in records],
        "adapter": [one.adapter for one in records],
        "tenant": [one.tenant for one in records],
        "prompt_tokens": [one.prompt_tokens for one in records],
        "output_tokens": [one.tokens for one in records],
        "status": [one.status for one in records],
        "first_token": [round(one.first_token, 4) if one.served else None for one in records],
        "per_token": [_rounded(one.per_token) if one.served else None for one in records],
        "total": [round(one.seconds, 4) if one.served else None for one in records],
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 5)


def to_json(line: Mapping[str, Any], separators: tuple[str, str] | None = None) -> str:
    """Where the repository lies is no part of a result: what is in it is named from its root."""
    text = json.dumps(line, separators=separators, default=str)
    return text.replace(json.dumps(f"{ROOT}/")[1:-1], "")


def write_line(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(to_json(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The runs' lines; those of comparisons are made again from them. Raises ValueError for a file
    with no results in it."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    runs = [line for line in lines if isinstance(line, dict) and "figures" in line]
    if not runs:
        raise ValueError(f"{path} has no results of load tests.")
    return runs
