"""`polydelta adapters formats`: what is read, what it becomes, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polydelta.server import options
from polydelta.server.settings import load_settings

if TYPE_CHECKING:
    import torch

    from polydelta.adapters_store.base_layout import BaseLayout
    from polydelta.adapters_store.formats.format_costs import Cost
    from polydelta.adapters_store.formats.format_table import FormatRow

COLUMNS = ("kind", "format", "served", "usual size", "per token", "in the pool")
# Name -> as it stands in a cell.
Quote = Callable[[str], str]


def formats(
    model: options.Model = None,
    dtype: options.Dtype = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As Markdown, as the README has it.")
    ] = False,
) -> None:
    """List the formats of adapters: what is served, what is converted, what is refused and why.

    Costs are those of an adapter of the usual size over the base model: multiply-adds for each
    token, relative to those of its linear layers, and bytes in the pool. Of the base it reads no
    weights.

    [bold]Examples[/bold]

    [cyan]polydelta adapters formats --model Qwen/Qwen3-0.6B[/cyan]
    what adapters cost over another base model
    """
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.adapters_store.formats.refusals import REFUSALS
    from polydelta.engine.build import torch_dtype
    from polydelta.engine.models.base_weights import checkpoint_layout
    from polydelta.engine.models.checkpoint import open_checkpoint

    settings = load_settings(model=model, dtype=dtype)
    served_in = torch_dtype(settings.dtype)
    layout = checkpoint_layout(open_checkpoint(settings.model), served_in)
    if markdown:
        typer.echo(as_markdown(layout, served_in), nl=False)
        return
    table = Table(*COLUMNS)
    for cells in _rows(layout, served_in, escape):
        table.add_row(*cells)
    refused = Table("refused", "why")
    for name, why in REFUSALS.items():
        refused.add_row(name, escape(why))
    console = Console()
    console.print(table)
    console.print(refused)


def as_markdown(layout: BaseLayout, dtype: torch.dtype) -> str:
    """The table, and after it a list of what is refused."""
    from polydelta.adapters_store.formats.refusals import REFUSALS

    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *_rows(layout, dtype, lambda name: f"`{name}`")]
    table = [f"| {' | '.join(cells)} |" for cells in rows]
    refused = [f"- `{name}`: {why}." for name, why in REFUSALS.items()]
    return "\n".join((*table, "", "Refused:", "", *refused, ""))


def _rows(layout: BaseLayout, dtype: torch.dtype, quote: Quote) -> Iterator[tuple[str, ...]]:
    """As text, in the order of COLUMNS."""
    from polydelta.adapters_store.formats.format_costs import base_multiply_adds, cost
    from polydelta.adapters_store.formats.format_table import FORMAT_ROWS

    of_base = base_multiply_adds(layout)
    for row in FORMAT_ROWS:
        costs = ("", "")
        if row.served:
            spent = cost(row, layout, dtype)
            costs = (_per_token(row, spent, of_base), _in_pool(spent))
        names = ", ".join(map(quote, row.formats))
        yield (", ".join(row.kinds), names, row.how, row.size, *costs)
