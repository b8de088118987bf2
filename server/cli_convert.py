"""`polydelta adapters convert`: any adapter as a LoRA, or as a model of its own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from polydelta.adapters_store.reference import AdapterRef
from polydelta.server import options
from polydelta.server.arguments import Adapter, BaseModel, Dtype, OutFolder
from polydelta.server.base_models import open_base, told_base
from polydelta.server.facts import facts_table, human_size, truncation_error
from polydelta.server.progress_bar import progress_bar
from polydelta.server.settings import ServerSettings, SettingsError, load_settings
from polydelta.server.stores import find_adapter

if TYPE_CHECKING:
    from polydelta.adapters_store.converting import ConvertedAdapter
    from polydelta.adapters_store.nearest_low_rank import Truncation


class Target(StrEnum):
    """What is written."""

    LORA = "lora"
    MODEL = "model"


def convert(
    adapter: Adapter,
    out: OutFolder,
    to: Annotated[
        Target, typer.Option("--to", help="A PEFT LoRA, or a merged Hugging Face model.")
    ] = Target.LORA,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA, in every module.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Share of each change's squared singular values that stays; the rank is the"
            " smallest that does it. Without it or --rank, low-rank changes stay exact, and of"
            " others 0.9 stays."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Number format of the file; without it, float32 of a LoRA, and of a model the one"
            " that it is served in."
        ),
    ] = None,
    model: BaseModel = None,
    store: options.Store = None,
) -> None:
    """Write an adapter of any kind as a LoRA, or merged into its base model.

    A LoRA is exact where the adapter's changes are of low rank. Of other changes it is the nearest
    one (singular value decomposition); what it leaves out is reported, relative to the whole change
    (Frobenius norm). Changes of biases stay exact.

    A model is a folder that transformers reads, and `polydelta serve --model` too. It can hold what
    a LoRA cannot: other norms, other rows of the embedding.

    [bold]Examples[/bold]

    [cyan]polydelta adapters convert ticket-label ./as-lora --energy 0.99[/cyan]
    a sparse adapter as the nearest LoRA that keeps 99% of it

    [cyan]polydelta adapters convert ./my-adapter ./my-model --to model[/cyan]
    the base model with the adapter in its weights
    """
    settings = load_settings(model=model, store=store)
    if to is Target.MODEL and (rank is not None or energy is not None):
        raise SettingsError(
            "--rank and --energy say how near a LoRA comes, and a model is exact: leave them out "
            "with --to model."
        )
    ref = find_adapter(adapter, settings)
    if to is Target.MODEL:
        facts = _to_model(ref, out, settings, dtype or Dtype(settings.dtype))
    else:
        facts = _to_lora(ref, out, settings, dtype or Dtype.FLOAT32, rank, energy)
    Console().print(facts)


def _to_lora(
    ref: AdapterRef,
    out: Path,
    settings: ServerSettings,
    dtype: Dtype,
    rank: int | None,
    energy: float | None,
) -> Table:
    # Here and not above: `polydelta --help` must not wait for torch.
    import torch

    from polydelta.adapters_store.converting import to_low_rank
    from polydelta.adapters_store.formats import read_adapter
    from polydelta.adapters_store.formats.peft_writer import write_adapter

    truncation = _truncation(rank, energy)
    base, layout = open_base(settings.model, settings.dtype)
    adapter = read_adapter(ref, layout)
    with progress_bar("converting") as progress:
        converted = to_low_rank(adapter, layout, truncation, progress)
    base_name = told_base([ref]) or settings.model or base.id
    write_adapter(out, converted.modules, base_name, getattr(torch, dtype))
    changes = {name: module.change for name, module in converted.by_module.items()}
    return _facts(
        out,
        {
            "from": f"{adapter.format} ({', '.join(adapter.kinds)})",
            "format": f"LORA in {dtype}",
            "modules": str(len(converted.by_module)),
            "ranks": _ranks(converted),
            "error": truncation_error(converted.error, changes),
        },
    )


def _to_model(ref: AdapterRef, out: Path, settings: ServerSettings, dtype: Dtype) -> Table:
    # Here and not above: `polydelta --help` must not wait for torch.
    import torch

    from polydelta.adapters_store.formats import read_adapter
    from polydelta.adapters_store.merged_model import MergedModel
    from polydelta.engine.models.hf_writer import write_model

    base, layout = open_base(settings.model, dtype)
    adapter = read_adapter(ref, layout)
    merged = MergedModel(adapter, layout)
    with progress_bar("converting") as progress:
        write_model(out, merged, base, getattr(torch, dtype), progress)
    untied = layout.tied and not merged.tied
    return _facts(
        out,
        {
            "from": f"{adapter.format} ({', '.join(adapter.kinds)})",
            "format": f"model in {dtype}",
            "base": base.id,
            "tensors": str(len(merged)),
            "head": "no longer the embedding" if untied else "as in the base",
        },
    )


def _truncation(rank: int | None, energy: float | None) -> Truncation | None:
    """Raises InvalidAdapterError."""
    from polydelta.adapters_store.nearest_low_rank import Truncation

    return None if rank is None and energy is None else Truncation(rank, energy)


def _facts(out: Path, rows: dict[str, str]) -> Table:
    """What was written, for people."""
    size = sum(file.stat().st_size for file in out.iterdir())
    return facts_table({"folder": str(out), **rows, "size": human_size(size)})


def _ranks(converted: ConvertedAdapter) -> str:
    ranks = sorted({module.change.delta.rank for module in converted.by_module.values()})
    if len(ranks) > 8:
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(str(rank) for rank in ranks)
