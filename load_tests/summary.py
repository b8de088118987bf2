"""A results file's lines as rows of a table: all columns for the page, fewer for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from load_tests.comparisons import Compared

Result = Mapping[str, Any]

# A line break where the table may have one.
PAGE_COLUMNS = (
    "run",
    "requests",
    "served",
    "refused",
    "failed",
    "requests\na second",
    "tokens\na second",
    "first token, s\np50 / p90 / p99",
    "per token, ms\np50 / p90 / p99",
    "SLO\nattainment",
    "satis-\nfaction",
    "Jain's\nindex",
)
# 80 characters, with the longest of our names for runs folded.
TERMINAL_COLUMNS = (
    "",
    "served",
    "req/s",
    "tok/s",
    "TTFT s\np50",
    "\np99",
    "TPOT ms\np50",
    "\np99",
    "SLO",
    "satisf.",
    "Jain",
)

RATIO_COLUMNS = ("", "ratio", "of turns", "one", "other", "bar", "")


def page_cells(one: Result) -> list[str]:
    """One for each of the page's columns."""
    found = one["figures"]
    return [
        one["run"],
        str(found["requests"]),
        str(found["throughput"]["requests"]),
        str(found["refused"]),
        str(found["failed"]),
        *_throughput(one),
        " / ".join(_times(one, "first_token_ms", ("p50", "p90", "p99"))),
        " / ".join(_times(one, "per_token_ms", ("p50", "p90", "p99"))),
        *_service(one),
    ]


def terminal_cells(one: Result) -> list[str]:
    found = one["figures"]
    return [
        one["run"],
        f"{found['throughput']['requests']}/{found['requests']}",
        *_throughput(one),
        *_times(one, "first_token_ms", ("p50", "p99")),
        *_times(one, "per_token_ms", ("p50", "p99")),
        *_service(one),
    ]


def table(results: Sequence[Result], title: str) -> Table:
    """The summary for a terminal."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    for place, column in enumerate(TERMINAL_COLUMNS):
        shown.add_column(column, justify="right" if place else "left", no_wrap=place > 0)
    for one in results:
        shown.add_row(*map(escape, terminal_cells(one)))
    return shown


def ratio_cells(one: Compared) -> list[str]:
    """One for each of the columns: the medians, what lies between the turns, and the bar."""
    verdict = {True: "met", False: "missed", None: ""}[one.met]
    return [
        one.comparison.name,
        f"{one.ratio:.3g}",
        f"{min(one.ratios):.3g} - {max(one.ratios):.3g}",
        f"{statistics.median(one.values):.4g}",
        f"{statistics.median(one.against):.4g}" if one.against else "",
        one.comparison.bar,
        verdict,
    ]


def table_of_ratios(compared: Sequence[Compared]) -> Table:
    shown = Table(title="Ratios", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(RATIO_COLUMNS):
        shown.add_column(column, justify="right" if place else "left", no_wrap=place > 0)
    for one in compared:
        shown.add_row(*map(escape, ratio_cells(one)))
    return shown


def _throughput(one: Result) -> list[str]:
    found = one["figures"]["throughput"]
    return [f"{found['requests_per_second']:.2f}", f"{found['output_tokens_per_second']:.0f}"]


def _times(one: Result, key: str, percentiles: Sequence[str]) -> list[str]:
    """First tokens in seconds, the rest in milliseconds; a dash where nothing was served."""
    found = one["figures"][key]
    if found is None:
        return ["-"] * len(percentiles)
    if key == "first_token_ms":
        return [f"{found[name] / 1e3:.2f}" for name in percentiles]
    return [f"{found[name]:.0f}" for name in percentiles]


def _service(one: Result) -> list[str]:
    found = one["figures"]
    fairness = found["jain_fairness"]
    return [
        f"{found['slo_attainment']:.2f}",
        f"{found['satisfaction']:.2f}",
        "-" if fairness is None else f"{fairness:.3f}",
    ]
