"""`polydelta kv-formats`: what KV formats take of the pool, and what goes with what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress, groupby
from operator import itemgetter
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from polydelta.engine.kv_composition import ROWS, Option, Row, in_full, not_with
from polydelta.server import options
from polydelta.server.settings import load_settings

if TYPE_CHECKING:  # imports torch, which takes seconds
    from polydelta.engine.kv_sizes import FormatSize

COMPOSITION = (
    "option",
    "methods",
    "prefix cache",
    "prompts are cut",
    "not with",
    "per request",
    "besides",
)

# What somebody would copy is in one piece.
WITH_NAMES = ("methods", "not with", "besides")

NATIVE = "native"

Rows = Iterable[Sequence[str]]


def kv_formats(
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    pool: options.Pool = None,
    block_size: options.BlockSize = None,
    max_batch_size: options.MaxBatchSize = None,
    kv_select: options.KvSelect = None,
    prefill: options.Prefill = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write Markdown, as in docs/kv_cache.md.")
    ] = False,
) -> None:
    """List the formats of the KV cache with what they take, and what composes with what.

    A page has the same bytes in every format; what is smaller has more tokens in it. No weights are
    read.

    [bold]Examples[/bold]

    [cyan]polydelta kv-formats --model Qwen/Qwen3-0.6B --pool 8GiB[/cyan]
    tokens in a pool of 8 GiB, for another base model

    [cyan]polydelta kv-formats --kv-select quest[/cyan]
    with the bounds of keys that this selection notes in each page
    """
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.engine.kv_sizes import format_sizes, told_pool
    from polydelta.engine.models.checkpoint import open_checkpoint

    settings = load_settings(
        model=model,
        device=device,
        dtype=dtype,
        pool=pool,
        block_size=block_size,
        max_batch_size=max_batch_size,
        kv_select=kv_select,
        prefill=prefill,
    )
    base = open_checkpoint(settings.model)
    config = settings.engine_config
    sizes = list(format_sizes(config, base.config))
    columns = _size_columns(ByteSize(told_pool(config)).human_readable())
    native = next((size.pool_tokens for size in sizes if size.name == NATIVE), 0)
    rows = [_size_cells(size, native) for size in sizes]
    composition = [_composition_cells(row) for row in ROWS]
    if markdown:
        _write(columns, rows)
        _explain(sizes)
        _write(COMPOSITION, composition)
        return
    _show(Table(*columns, box=box.SIMPLE_HEAD), rows)
    _explain(sizes)
    # A table for each option, so that names can be read whole in 80 columns.
    for option, some in groupby(composition, itemgetter(0)):
        cells = [
            [cell.replace(", ", "\n") for cell in row[1:-1]] + [_narrow(row[-1])] for row in some
        ]
        # Without columns in which none says anything.
        said = [any(column) for column in zip(*cells, strict=True)]
        each = (Column(name, no_wrap=name in WITH_NAMES) for name in COMPOSITION[1:])
        table = Table(
            *compress(each, said),
            title=option,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        _show(table, (list(compress(row, said)) for row in cells))


def _narrow(listed: str) -> str:
    """In lines as long as the longest name of a setting."""
    width = len("--host-kv-gib")
    return "\n".join(
        line for item in listed.split(", ") for line in wrap(item, width, break_on_hyphens=False)
    )


def _show(table: Table, rows: Rows) -> None:
    for cells in rows:
        table.add_row(*map(escape, cells))
    Console().print(table)


def _write(columns: Sequence[str], rows: Rows) -> None:
    """In Markdown."""
    lines = (columns, ["---"] * len(columns), *rows)
    typer.echo("\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")


def _explain(sizes: Iterable[FormatSize]) -> None:
    """Why some have no token, a line for each reason."""
    names: dict[str, list[str]] = {}
    for size in sizes:
        if size.problem is not None:
            names.setdefault(size.problem, []).append(size.name)
    for problem, some in names.items():
        typer.echo(f"{', '.join(some)}: {options.as_options(problem)}\n")


def _size_columns(pool: str) -> Sequence[str]:
    return ("format", "bytes a token", "tokens a page", f"tokens in {pool}", "of native")


def _size_cells(size: FormatSize, native: int) -> Sequence[str]:
    """native: tokens that the pool holds in that format."""
    if not size.page_tokens:
        return (size.name, "", "", "", "")
    return (
        size.name,
        f"{size.token_bytes:,.0f}",
        str(size.page_tokens),
        f"{size.pool_tokens:,}",
        f"{size.pool_tokens / native:.2f}x" if native else "",
    )


def _composition_cells(row: Row) -> Sequence[str]:
    """In the order of COMPOSITION."""
    return (
        f"--{row.option.replace('_', '-')}",
        ", ".join(map(in_full, row.names)),
        row.prefix_caching,
        row.chunks,
        ", ".join(not_with(row)),
        row.per_request if row.option is Option.SELECT else "",
        options.as_options(row.limits),
    )
