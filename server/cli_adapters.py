"""`polydelta adapters list|inspect|merge|push`: adapters on disk, and what would refuse them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from polydelta.adapters_store.folders import FolderCatalog
from polydelta.server import options
from polydelta.server.arguments import Adapter, BaseModel
from polydelta.server.base_models import open_base
from polydelta.server.cli_convert import convert
from polydelta.server.cli_distill import distill_delta
from polydelta.server.cli_formats import formats
from polydelta.server.cli_import import imports
from polydelta.server.cli_merge import merge
from polydelta.server.cli_push import push
from polydelta.server.cli_quantize import quantize
from polydelta.server.facts import facts_table, human_size
from polydelta.server.settings import load_settings
from polydelta.server.stores import find_adapter, open_store

if TYPE_CHECKING:
    from polydelta.adapters_store.inspection import AdapterSummary
    from polydelta.adapters_store.records import AdapterRecord

COLUMNS = ("id", "format", "kinds", "ranks", "size", "modules")

adapters = typer.Typer(
    help="Look at adapters on disk, merge them, and send them to a server.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
adapters.command("distill-delta")(distill_delta)
adapters.add_typer(imports, name="import")
adapters.command("merge")(merge)
adapters.command("convert")(convert)
adapters.command("quantize")(quantize)
adapters.command("push")(push)
adapters.command("formats")(formats)


@adapters.command("list")
def list_adapters(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of adapters; without any, all that `serve` would have."),
    ] = None,
    store: options.Store = None,
) -> None:
    """List adapters, uploaded and in folders: kind, rank, size, and what would refuse them.

    Of folders it reads configs and headers only; `inspect` checks numbers, and shapes against a
    base model.

    [bold]Examples[/bold]

    [cyan]polydelta adapters list[/cyan]
    what was uploaded, and the samples that come along

    [cyan]polydelta adapters list ./adapters ./more-adapters[/cyan]
    """
    # Here and not above: reading weights needs torch, which takes seconds to import.
    from polydelta.adapters_store.inspection import inspect
    from polydelta.adapters_store.listing import AdapterListing

    settings = load_settings(adapters=folders, store=store)
    table = Table(*COLUMNS, "looks sound")
    if folders:
        for ref in FolderCatalog(settings.adapters).list():
            summary = inspect(ref.path)
            table.add_row(*map(escape, _cells(summary)), _verdict(summary.problem))
    else:
        with closing(open_store(settings)) as opened:
            for record in AdapterListing(opened).all():
                table.add_row(*map(escape, _record_cells(record)), _verdict(record.problem))
    Console().print(table)


@adapters.command("inspect")
def inspect_adapter(
    adapter: Adapter,
    model: BaseModel = None,
    store: options.Store = None,
) -> None:
    """Show one adapter: kind, rank, modules, bytes, digest, and what would refuse it.

    Reads it whole and checks it against a base model, as `serve` does when it is first asked for.

    Leaves with code 1 when the adapter cannot be served.

    [bold]Examples[/bold]

    [cyan]polydelta adapters inspect ./adapters/my-adapter[/cyan]
    a folder

    [cyan]polydelta adapters inspect support-bot@3[/cyan]
    what was uploaded as version 3
    """
    from polydelta.adapters_store.inspection import inspect

    settings = load_settings(model=model, store=store)
    ref = find_adapter(adapter, settings)
    base, layout = open_base(settings.model, settings.dtype)
    summary = inspect(ref.path, layout)
    counts = (f"{name}: {count}" for name, count in summary.modules_by_name.items())
    facts: dict[str, str | Text] = {
        **dict(zip(COLUMNS, _cells(summary), strict=True)),
        "": "\n".join(counts),
        "digest": summary.digest,
        f"can be served by {base.id}": _verdict(summary.problem),
    }
    Console().print(facts_table(facts))
    if summary.problem:
        raise typer.Exit(1)


def _cells(summary: AdapterSummary) -> tuple[str, ...]:
    """An adapter as text, in the order of COLUMNS."""
    return (
        summary.id,
        summary.format,
        ", ".join(summary.kinds),
        ", ".join(str(rank) for rank in summary.ranks),
        human_size(summary.bytes),
        str(summary.modules),
    )


def _record_cells(record: AdapterRecord) -> tuple[str, ...]:
    """A version in the store or in a folder as text, in the order of COLUMNS."""
    facts = record.facts
    return (
        record.name,
        facts.format,
        ", ".join(facts.kinds),
        str(facts.rank or ""),
        human_size(facts.nbytes),
        str(facts.modules),
    )


def _verdict(problem: str | None) -> Text:
    return Text(f"no: {problem}", "red") if problem else Text("yes", "green")
