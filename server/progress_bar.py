"""Bars for work that takes a while, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

# stage, done, total; None for a total that is not known yet
Report = Callable[[str, int, int | None], None]


@contextmanager
def progress_bars(console: Console, *columns: ProgressColumn) -> Iterator[Report]:
    """Yields what is to be told of the work; each stage has a bar. They are gone afterwards.

    columns: what each shows between its bar and the time.
    """
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeElapsedColumn())
    # In a log file a bar is noise.
    quiet = not console.is_terminal
    with Progress(*shown, console=console, transient=True, disable=quiet) as progress:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total)
            progress.update(stages[stage], completed=done, total=total)

        yield report


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """One bar, on standard error. Yields what is to be told of the work: `(done, total)`."""
    with progress_bars(Console(stderr=True), MofNCompleteColumn()) as report:
        report(what, 0, None)
        yield partial(report, what)
