"""`polydelta kv-formats`: what KV formats take of the pool, and what goes with what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from polydelta.engine.kv_composition import ROWS, PerRequest, Row, in_full, not_with
from polydelta.server import options
from polydelta.server.settings import load_settings

if TYPE_CHECKING:  # imports torch, which takes seconds
    from polydelta.engine.config import EngineConfig
    from polydelta.engine.kv_sizes import FormatSize
    from polydelta.engine.models.config import ModelConfig

COMPOSITION = (
    "option",
    "methods",
    "prefix cache",
    "prompts are cut",
    "not with",
    "per request",
    "besides",
)

Rows = Iterable[Sequence[str]]


def kv_formats(
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    pool: options.Pool = None,
    block_size: options.BlockSize = None,
    max_batch_size: options.MaxBatchSize = None,
    kv_select: options.KvSelect = None,
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
    from polydelta.engine.models.checkpoint import open_checkpoint

    settings = load_settings(
        model=model,
        device=device,
        dtype=dtype,
        pool=pool,
        block_size=block_size,
        max_batch_size=max_batch_size,
        kv_select=kv_select,
    )
    base = open_checkpoint(settings.model)
    for columns, rows in _tables(settings.engine_config, base.config):
        if markdown:
            lines = (columns, ["---"] * len(columns), *rows)
            typer.echo("\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
            continue
        if columns is not COMPOSITION:
            _show(Table(*columns, box=box.SIMPLE_HEAD), rows)
            continue
        # A table for each option, so that names can be read whole in 80 columns.
        for option, some in groupby(rows, itemgetter(0)):
            whole = ("methods", "not with")
            each = (Column(name, no_wrap=name in whole, overflow="fold") for name in columns[1:])
            table = Table(*each, title=option, box=box.SIMPLE_HEAD, title_justify="left")
            _show(table, (cells[1:] for cells in some))


def _show(table: Table, rows: Rows) -> None:
    """Names under one another."""
    for cells in rows:
        table.add_row(*(escape(cell).replace(", ", "\n") for cell in cells))
    Console().print(table)


def _tables(config: EngineConfig, model: ModelConfig) -> Iterator[tuple[Sequence[str], Rows]]:
    """Columns and rows: what formats take, and what composes."""
    from polydelta.engine.kv_sizes import format_sizes, told_pool

    pool = ByteSize(told_pool(config)).human_readable()
    columns = ("format", "bytes a token", "tokens a page", f"tokens in {pool}", "of native")
    sizes = list(format_sizes(config, model))
    native = sizes[0].pool_tokens
    yield columns, (_size_cells(size, native) for size in sizes)
    yield COMPOSITION, map(_composition_cells, ROWS)


def _size_cells(size: FormatSize, native: int) -> Sequence[str]:
    """native: tokens that the pool holds in that format."""
    if not size.page_tokens:
        return (size.name, "not with this model", "", "", "")
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
        row.per_request if row.per_request is not PerRequest.NEVER else "",
        row.limits,
    )
