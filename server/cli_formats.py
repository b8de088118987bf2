"""`polydelta adapters formats`: what is read, what it becomes, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polydelta.adapters_store.delta_kinds import INVOCATION, ONE_BIT
from polydelta.server import options
from polydelta.server.settings import load_settings

if TYPE_CHECKING:
    import torch

    from polydelta.adapters_store.base_layout import BaseLayout
    from polydelta.adapters_store.formats.format_costs import Cost
    from polydelta.adapters_store.formats.format_table import FormatRow

COLUMNS = ("kind", "format", "served", "usual size", "per token", "in the pool")
REFUSED = ("refused", "why, and what to do instead")
_AS_CONVERTED = "as the LoRA"
# What a percentage leaves out.
_REMARKS = {ONE_BIT: "of 1 bit each", INVOCATION: "once called"}


def formats(
    model: options.Model = None,
    dtype: options.Dtype = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write Markdown, as in the README.")
    ] = False,
) -> None:
    """List the formats of adapters: what is served, what is converted, what is refused and why.

    Costs are those of an adapter of the usual size over the base model: its multiply-adds for each
    token, in percent of those of the base's linear layers, and its bytes in the pool. No weights
    are read.

    [bold]Examples[/bold]

    [cyan]polydelta adapters formats --model Qwen/Qwen3-0.6B[/cyan]
    what adapters cost over another base model
    """
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.engine.device import torch_dtype
    from polydelta.engine.models.checkpoint import open_checkpoint
    from polydelta.engine.models.decoder import base_layout

    settings = load_settings(model=model, dtype=dtype)
    served_in = torch_dtype(settings.dtype)
    base = open_checkpoint(settings.model)
    layout = base_layout(base.config, base.id)
    if markdown:
        typer.echo(as_markdown(layout, served_in))
        return
    for columns, rows in _tables(layout, served_in):
        table = Table(*columns)
        for cells in rows:
            table.add_row(*(escape(cell.replace("`", "")) for cell in cells))
        Console().print(table)


def as_markdown(layout: BaseLayout, dtype: torch.dtype) -> str:
    """Two tables: what is read, and what is refused."""
    tables = [
        "\n".join(_line(cells) for cells in (columns, ["---"] * len(columns), *rows))
        for columns, rows in _tables(layout, dtype)
    ]
    return "\n\n".join(tables)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tables(
    layout: BaseLayout, dtype: torch.dtype
) -> Iterator[tuple[Sequence[str], Iterable[Sequence[str]]]]:
    """Columns and rows, as Markdown."""
    from polydelta.adapters_store.formats.format_table import FORMAT_ROWS
    from polydelta.adapters_store.formats.refusals import REFUSALS

    yield COLUMNS, (_cells(row, layout, dtype) for row in FORMAT_ROWS)
    yield REFUSED, ((f"`{name}`", why) for name, why in REFUSALS.items())


def _cells(row: FormatRow, layout: BaseLayout, dtype: torch.dtype) -> tuple[str, ...]:
    """In the order of COLUMNS."""
    from polydelta.adapters_store.formats.format_costs import base_multiply_adds, cost

    names = ", ".join(f"`{name}`" for name in row.formats)
    about = (", ".join(row.kinds), names, row.how, row.size)
    if not row.served:
        return (*about, _AS_CONVERTED, _AS_CONVERTED)
    spent = cost(row, layout, dtype)
    in_pool = ByteSize(spent.nbytes).human_readable(decimal=True, separator=" ")
    return (*about, _per_token(row, spent, base_multiply_adds(layout)), in_pool)


def _per_token(row: FormatRow, spent: Cost, of_base: int) -> str:
    if spent.prefix_tokens:
        return f"attends to {spent.prefix_tokens:,} more"
    if not spent.multiply_adds:
        return "nothing"
    percent = 100 * spent.multiply_adds / of_base
    remarks = [_REMARKS[kind] for kind in row.kinds if kind in _REMARKS]
    return ", ".join(("under 0.01%" if percent < 0.01 else f"{percent:.3g}%", *remarks))
