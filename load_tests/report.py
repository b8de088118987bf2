"""Runs a suite of load tests, and reports it.

    python -m load_tests.report                        # the short suite
    python -m load_tests.report scale --only 2,000     # some runs of another one
    python -m load_tests.report pressure --only pool   # some comparisons
    python -m load_tests.report --url http://127.0.0.1:8000
    python -m load_tests.report --trace trace.jsonl    # arrivals, adapters and lengths of a file
    python -m load_tests.report --from results.jsonl   # the page once more

A server is started for each run, or the one at --url is asked: then with the adapters that it
lists, whatever the suite says of server and adapters. Leaves `results.jsonl`, a line for each run
with all of its configuration, requests and time series, and `report.html` in one folder; results
that are there already stay, and are shown with the new ones. `brief.jsonl` has the same with less
of each request, to be committed, and a line for each comparison of the suite.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.http_client import Endpoint
from benchmarks.served import served
from load_tests import made_adapters
from load_tests.brief import write_brief
from load_tests.comparisons import compare
from load_tests.measuring import measure
from load_tests.page import make_page
from load_tests.results import git_revision, read_lines, result, write_line
from load_tests.run import Run
from load_tests.suites import SUITES
from load_tests.suites.suite import Suite
from load_tests.summary import table, table_of_ratios

BUILD = Path(__file__).parents[1] / "build" / "load_tests"
STORE = BUILD / "store"
RESULTS, BRIEF, PAGE = "results.jsonl", "brief.jsonl", "report.html"


def run_suite(
    name: str, suite: Suite, path: Path, url: str | None, api_key: str | None, console: Console
) -> None:
    """Adds each run's line to `path` when it is over."""
    where = {"machine": _machine(), "revision": git_revision()}
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    if url is not None:
        console.print(
            f"{url} is asked as it is: neither the suites' server options nor their numbers of"
            " adapters hold, and machine and revision below are this client's.",
            highlight=False,
        )
    with Progress(*columns, console=console) as progress:
        for number, run in enumerate(suite.runs, start=1):
            title = f"{number}/{len(suite.runs)}  {run.name}"
            task = progress.add_task(f"{title}: starting", total=None)
            if url is not None:  # whose options and keys are not ours to set
                run = replace(run, server=(), tenant_keys=(), api_key=None)
            with _server(run, url) as server:
                endpoint = Endpoint(server["url"], api_key or run.api_key)
                total = len(run.workload.requests())
                progress.update(task, description=f"{title}: warming up", total=total)
                advance = _advancer(progress, task, title)
                outcome = asyncio.run(measure(endpoint, run, advance))
            about = {
                "model": outcome.models.base,
                "adapters": len(outcome.models.adapters),
                **server,
            }
            write_line(path, result(name, run, outcome, {"server": about, **where}))


def _advancer(progress: Progress, task: TaskID, title: str) -> Callable[[], None]:
    return lambda: progress.update(task, advance=1, description=title)


@contextmanager
def _server(run: Run, url: str | None) -> Iterator[dict[str, Any]]:
    """Facts of the server that a run asks: its own one, as long as the context lasts, or that at
    the URL."""
    if url is not None:
        yield {"url": url, "about": url}
        return
    folder = made_adapters.make(run.adapter_set)
    # One store for all runs: each adapter is packed once.
    arguments = shlex.join((*run.server, "--adapters", str(folder), "--store", str(STORE)))
    with served(arguments) as started:
        yield {
            "url": started.url,
            "about": "polydelta serve, started for each run",
            "arguments": arguments,
            "seconds_to_ready": round(started.seconds_to_ready, 2),
        }


def _machine() -> dict[str, Any]:
    from benchmarks.machine import describe_machine  # imports torch, which takes seconds

    return describe_machine()


def write_page(folder: Path, lines: list[dict[str, Any]], console: Console) -> None:
    """And the brief results."""
    name = lines[0]["suite"]
    suite = SUITES.get(name, Suite("", ()))
    compared = compare(suite.comparisons, lines)
    folder.mkdir(parents=True, exist_ok=True)
    write_brief(folder / BRIEF, name, lines, compared)
    page = folder / PAGE
    page.write_text(make_page(lines, suite.about, compared))
    console.print(table(lines, f"Load test: {name}"))
    if compared:
        console.print(table_of_ratios(compared))
    console.print(f"The report is {page}", soft_wrap=True, highlight=False)


def show_suites(console: Console) -> None:
    for name, suite in SUITES.items():
        console.print(f"[bold]{name}[/]: {suite.about}", highlight=False)
        for one in suite.comparisons or suite.runs:
            console.print(f"    {one.name}", markup=False, highlight=False)


def main(
    suite: Annotated[str, typer.Argument(help="Its name; --list has them.")] = "short",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; a new one in build/ without it.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Of a server that runs; it is asked as it is.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Sent to that as a bearer token.")] = None,
    only: Annotated[str, typer.Option(help="Runs, or comparisons, with this in their names.")] = "",
    trace: Annotated[
        Path | None,
        typer.Option(help="A recorded trace to replay instead, .jsonl or .csv.", dir_okay=False),
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", help="Makes the page of these results again.", dir_okay=False),
    ] = None,
    list_suites: Annotated[bool, typer.Option("--list", help="Shows the suites.")] = False,
) -> None:
    """Load-tests an OpenAI-style server with many adapters."""
    console = Console()
    if list_suites:
        show_suites(console)
        return
    try:
        if from_file is not None:
            write_page(out or from_file.parent, read_lines(from_file), console)
            return
        chosen = _choose(suite, only, trace)
        folder = out or BUILD / time.strftime(f"{suite}-%Y%m%d-%H%M%S")
        folder.mkdir(parents=True, exist_ok=True)
        run_suite(suite, chosen, folder / RESULTS, url, api_key, console)
        write_page(folder, read_lines(folder / RESULTS), console)
    except (OSError, RuntimeError, ValueError) as problem:
        sys.exit(str(problem))


def _choose(name: str, only: str, trace: Path | None) -> Suite:
    if name not in SUITES:
        raise ValueError(f"There is no suite {name!r}: {', '.join(SUITES)}.")
    chosen = SUITES[name].only(only)
    if not chosen.runs:
        raise ValueError(f"Suite {name!r} has nothing with {only!r} in its name.")
    return chosen if trace is None else chosen.replaying(trace)


if __name__ == "__main__":
    typer.run(main)
