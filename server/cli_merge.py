"""`polydelta adapters merge`: one adapter made of several, as a folder of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.merge_recipe import Election, MergeRecipe, Method
from polydelta.adapters_store.reference import AdapterRef
from polydelta.server import options
from polydelta.server.arguments import BaseModel, Dtype, OutFolder
from polydelta.server.base_models import open_base, told_base
from polydelta.server.facts import facts_table, human_size, truncation_error
from polydelta.server.progress_bar import progress_bar
from polydelta.server.settings import ServerSettings, SettingsError, load_settings
from polydelta.server.stores import find_adapter

if TYPE_CHECKING:
    from polydelta.adapters_store.base_layout import BaseLayout
    from polydelta.adapters_store.delta import Adapter
    from polydelta.adapters_store.merging import MergedAdapter


def merge(
    out: OutFolder,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER=WEIGHT...",
            help="Adapters with their weights; a folder, or an id that `serve` would find."
            " Negative weights take a change away.",
        ),
    ],
    method: Annotated[Method, typer.Option(help="How they are put together.")] = Method.LINEAR,
    density: Annotated[
        float | None,
        typer.Option(
            help="Share of each adapter's entries of dW that stays, above 0 up to 1; zeros count"
            " as entries. For every method but linear."
        ),
    ] = None,
    election: Annotated[
        Election,
        typer.Option(help="Whose sign wins in ties and dare-ties: the larger sum, or the more."),
    ] = Election.TOTAL,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Write a LoRA of this rank, the nearest to the merged change. Without it, what"
            " linear gives stays exact, and the other methods take the largest rank that goes in."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws of dare and dare-ties.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the file.")] = Dtype.FLOAT32,
    model: BaseModel = None,
    store: options.Store = None,
) -> None:
    """Merge adapters into a new one, which PEFT reads too.

    linear sums the changes, exactly: ranks add up. magnitude sums the largest entries of each.
    ties takes these, and for each entry the mean of those that agree on its sign. dare keeps
    entries by chance and scales them up before it sums; dare-ties draws as dare does and takes the
    mean as ties does. Weights multiply each change before the sum or the mean.

    LoRAs give a LoRA. SHiRAs alone give a SHiRA, or with --rank a LoRA. A LoRA and a SHiRA give a
    LoRA; as no file holds their exact sum, linear then asks for --rank. What the rank leaves out is
    reported, relative to the whole change (Frobenius norm).

    [bold]Examples[/bold]

    [cyan]polydelta adapters merge ./both iso-date=1 unit-convert=1[/cyan]
    two of the sample adapters, exactly

    [cyan]polydelta adapters merge ./new ./a=0.7 ./b=0.5 --method ties --density 0.2[/cyan]
    the largest fifth of each; where they pull apart, the stronger wins

    [cyan]polydelta adapters merge ./less ./a=1 ./b=-0.5 --dtype bfloat16[/cyan]
    one adapter less half of another, in half the space
    """
    recipe = MergeRecipe(method, density, seed, rank, election)
    settings = load_settings(model=model, store=store)
    refs = [_source(text, settings) for text in sources]
    # Here and not above: `polydelta --help` must not wait for torch.
    import torch

    from polydelta.adapters_store.formats.peft_writer import write_adapter
    from polydelta.adapters_store.merging import merge as merge_adapters

    base, layout = open_base(settings.model, settings.dtype)
    adapters = [(_read(ref, layout), weight) for ref, weight in refs]
    with progress_bar("merging") as progress:
        merged = merge_adapters(adapters, recipe, progress)
    base_name = told_base(ref for ref, _ in refs) or settings.model or base.id
    write_adapter(out, merged.modules, base_name, getattr(torch, dtype))
    Console().print(_facts(out, merged, recipe, dtype))


def _source(text: str, settings: ServerSettings) -> tuple[AdapterRef, float]:
    """FOLDER=WEIGHT, the folder named by path or by id. Raises SettingsError, AdapterError."""
    name, equals, number = text.rpartition("=")
    if not equals or not name:
        raise SettingsError(f"FOLDER=WEIGHT: {text!r} has no weight; write {text.strip('=')}=1.0.")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise SettingsError(
            f"FOLDER=WEIGHT: the weight of {name!r} is {number!r}; give a number other than 0, "
            "such as 0.5."
        )
    return find_adapter(name, settings), weight


def _read(ref: AdapterRef, layout: BaseLayout) -> Adapter:
    """Raises InvalidAdapterError, which says which of them it is."""
    from polydelta.adapters_store.formats import read_adapter

    try:
        return read_adapter(ref, layout)
    except InvalidAdapterError as error:
        raise InvalidAdapterError(f"{str(ref.path)!r}: {error}") from None


def _facts(out: Path, merged: MergedAdapter, recipe: MergeRecipe, dtype: Dtype) -> Table:
    """What was written, for people."""
    from polydelta.adapters_store.inspection import inspect

    summary = inspect(out)
    ranks = ", ".join(map(str, summary.ranks))
    return facts_table(
        {
            "folder": str(out),
            "method": _described(recipe),
            "format": f"{summary.format} in {dtype}",
            "modules": str(summary.modules),
            **({"ranks": ranks} if ranks else {}),
            "size": human_size(summary.bytes),
            "error": truncation_error(merged.error, merged.by_module),
        }
    )


def _described(recipe: MergeRecipe) -> str:
    density = "" if recipe.density is None else f", density {recipe.density}"
    seed = f", seed {recipe.seed}" if recipe.method.draws else ""
    election = f", election by {recipe.election}" if recipe.method.elects else ""
    return f"{recipe.method}{density}{election}{seed}"
