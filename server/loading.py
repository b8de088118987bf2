"""Loading the model for a command, with a progress bar on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from polydelta.server.settings import ServerSettings

if TYPE_CHECKING:  # the engine imports torch, which takes seconds
    from polydelta.engine.build import MakeLoader
    from polydelta.engine.engine import Engine


def load_engine(settings: ServerSettings, console: Console, make_loader: MakeLoader) -> Engine:
    """The engine, built and not yet started. Raises ModelError."""
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.engine.build import build_engine

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # In a log file a bar is noise.
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total)
            progress.update(stages[stage], completed=done, total=total)

        return build_engine(settings.model, settings.engine_config, report, make_loader)
