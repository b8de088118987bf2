"""Loading the model for a command, with a progress bar on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from polydelta.server.progress_bar import Report, progress_bars
from polydelta.server.settings import ServerSettings

if TYPE_CHECKING:  # the engine imports torch, which takes seconds
    from polydelta.engine.build import MakeLoader
    from polydelta.engine.engine import Engine


def no_report(stage: str, done: int, total: int | None) -> None:
    """For those who have the bars only."""


def load_engine(
    settings: ServerSettings,
    console: Console,
    make_loader: MakeLoader,
    also: Report = no_report,
) -> Engine:
    """The engine, built and not yet started. Raises ModelError.

    also: is told what the progress bars are told.
    """
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.engine.build import build_engine

    with progress_bars(console) as show:

        def report(stage: str, done: int, total: int | None) -> None:
            show(stage, done, total)
            also(stage, done, total)

        return build_engine(settings.model, settings.engine_config, report, make_loader)
