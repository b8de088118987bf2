"""`polydelta calibrate`: which channels of a model's keys tell which tokens matter."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console

from polydelta.server import options
from polydelta.server.facts import facts_table
from polydelta.server.progress_bar import progress_bar
from polydelta.server.settings import load_settings


class CalibrateError(Exception):
    """Nothing can be calibrated, or written; the message says why."""


def calibrate(
    text: Annotated[
        Path | None,
        typer.Argument(
            metavar="[TEXT_FILE]",
            help="Text like that which will be served, in UTF-8; a few thousand words are enough."
            " Without it, a part of Python's own documentation.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where the labels are written.")
    ] = Path("kv_labels.json"),
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Find the label channels of a base model, for `serve --kv-select double-sparsity`.

    The model reads the text; for each kv head the channels are kept in which queries and keys agree
    most. The file belongs to this base model, with whatever adapters.

    [bold]Examples[/bold]

    [cyan]polydelta calibrate --out labels.json[/cyan]
    the default model, on a text that comes along

    [cyan]polydelta serve --kv-select double-sparsity --kv-labels labels.json[/cyan]
    what it is for
    """
    settings = load_settings(model=model, device=device, dtype=dtype)
    read = None if text is None else _read(text)
    # Before the model loads: a wrong place should not cost the wait.
    if not out.parent.is_dir():
        raise CalibrateError(f"--out: {str(out.parent)!r} is not a folder.")
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.engine.kv_calibrating import calibrate_model

    try:
        with progress_bar("calibrating") as report:
            labels = calibrate_model(settings.model, settings.device, settings.dtype, read, report)
        labels.write(out)
    except ValueError as error:
        raise CalibrateError(str(error)) from None
    except OSError as error:
        raise CalibrateError(f"--out: {str(out)!r} cannot be written: {error.strerror}.") from None
    layers, heads, channels = labels.channels.shape
    facts = {
        "file": str(out),
        "model": labels.model,
        "text": labels.text,
        "tokens": f"{labels.tokens:,}",
        "channels": f"{channels} of each of {heads} kv heads, in {layers} layers",
    }
    Console().print(facts_table(facts))
    call = f"polydelta serve --kv-select double-sparsity --kv-labels {quote(str(out))}"
    typer.echo(call if model is None else f"{call} --model {quote(model)}", err=True)


def _read(text: Path) -> str:
    """Raises CalibrateError."""
    try:
        return text.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrateError(f"{str(text)!r} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise CalibrateError(f"{str(text)!r} is not text in UTF-8.") from None
