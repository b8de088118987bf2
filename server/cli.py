"""The command line: `polydelta serve`, `generate`, `adapters` and the rest."""

from __future__ import annotations

import sys
from importlib.metadata import version

import typer
from rich.console import Console

from polydelta.adapters_store.errors import AdapterError
from polydelta.engine.models.errors import ModelError
from polydelta.server.cli_adapters import adapters
from polydelta.server.cli_calibrate import CalibrateError, calibrate
from polydelta.server.cli_generate import GenerateError, generate
from polydelta.server.cli_kv_formats import kv_formats
from polydelta.server.cli_push import PushError
from polydelta.server.cli_serve import serve
from polydelta.server.options import as_options
from polydelta.server.settings import SettingsError

# What a user can mend: told in one line. Anything else is a bug and shows its traceback.
USER_ERRORS = (
    SettingsError,
    ModelError,
    AdapterError,
    GenerateError,
    CalibrateError,
    PushError,
)

app = typer.Typer(
    help="Serve one base language model and thousands of fine-tuned variants of it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(generate)
app.command()(kv_formats)
app.command()(calibrate)
app.add_typer(adapters, name="adapters")


@app.command("version")
def show_version() -> None:
    """Print the version."""
    typer.echo(version("polydelta"))


def main() -> None:
    """The entry point: exit code 1 for an error with a message, 2 for a wrong command line."""
    try:
        app()
    except USER_ERRORS as error:
        console = Console(stderr=True)
        # The engine, which others than this command use, names its settings.
        said = as_options(str(error)) if isinstance(error, ModelError) else str(error)
        console.print(f"Error: {said}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
