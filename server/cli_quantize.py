"""`polydelta adapters quantize`: an adapter in fewer bits, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.server import options
from polydelta.server.arguments import Adapter, BaseModel, OutFolder
from polydelta.server.facts import facts_table, human_size
from polydelta.server.loading import load_engine
from polydelta.server.settings import ServerSettings, load_settings
from polydelta.server.stores import find_adapter

if TYPE_CHECKING:
    from polydelta.engine.drift import Drift

# Prose, numbers and JSON, since adapters are made for all of these.
TEXT = 'The meeting is on 14 March at half past nine.\n{"name": "kettle", "price": 24.5}'


def quantize(
    adapter: Adapter,
    out: OutFolder,
    bits: Annotated[int, typer.Option(help="For each number: 8, 4 or 1.", metavar="8|4|1")],
    group_size: Annotated[
        int, typer.Option(min=1, help="Numbers that share a scale, which takes 16 bits.")
    ] = 64,
    drift: Annotated[
        bool, typer.Option("--drift/--no-drift", help="Compare the answers of both adapters.")
    ] = True,
    model: BaseModel = None,
    store: options.Store = None,
) -> None:
    """Store an adapter of any format in 8, 4 or 1 bits for each number.

    The folder can be served, uploaded and inspected as any other; PEFT does not read it. It takes
    less room on disk and on its way to a server; once loaded, it takes what the original takes.

    To show the cost, both adapters predict each next token of a short text, in float32: by how much
    their log probabilities differ, and the divergence of their predictions (KL, in nats), beside
    that of the bare base model from the adapter.

    [bold]Examples[/bold]

    [cyan]polydelta adapters quantize iso-date ./iso-date-4bit --bits 4[/cyan]
    a sample adapter in 4 bits

    [cyan]polydelta adapters quantize ./my-adapter ./small --bits 8 --no-drift[/cyan]
    without loading a model
    """
    settings = load_settings(model=model, store=store, dtype="float32")
    ref = find_adapter(adapter, settings)
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.adapters_store.formats.adapter_folder import write_folder
    from polydelta.adapters_store.formats.files import (
        parse_weights,
        read_config_bytes,
        read_weights_bytes,
    )
    from polydelta.adapters_store.formats.modules import outline_adapter
    from polydelta.adapters_store.formats.peft_config import parse_config
    from polydelta.adapters_store.formats.quantized import dequantised
    from polydelta.adapters_store.quantizing import quantize as quantized

    config, tensors = dequantised(
        parse_config(read_config_bytes(ref.path)), parse_weights(read_weights_bytes(ref.path))
    )
    outline_adapter(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    write_folder(out, *quantized(config, tensors, bits, group_size))
    console = Console()
    console.print(_sizes(ref.path, out, bits, group_size))
    if drift:
        try:
            console.print(_drift(ref, out, settings))
        except InvalidAdapterError as error:
            console.print(f"drift: not measured, for this adapter is not served: {error}")


def _sizes(before: Path, after: Path, bits: int, group_size: int) -> Table:
    from polydelta.adapters_store.inspection import inspect

    old, new = inspect(before).bytes, inspect(after).bytes
    return facts_table(
        {
            "folder": str(after),
            "stored in": f"{bits} bits, a scale for each {group_size}",
            "before": human_size(old),
            "after": f"{human_size(new)}, {old / new:.2f} times smaller",
        }
    )


def _drift(ref: AdapterRef, out: Path, settings: ServerSettings) -> Table:
    """Raises InvalidAdapterError for an adapter that is not served."""
    from polydelta.adapters_store.disk_tier import FolderLoader
    from polydelta.adapters_store.formats.files import read_config_bytes
    from polydelta.adapters_store.formats.peft_config import parse_config
    from polydelta.engine.drift import drift, log_probabilities

    engine = load_engine(settings, Console(stderr=True), FolderLoader)
    # Activated LoRAs act after these tokens alone.
    invocation = parse_config(read_config_bytes(ref.path)).get("alora_invocation_tokens") or []
    tokens = [*invocation, *engine.tokenizer.encode(TEXT)]
    engine.start()
    try:
        original, quantized, base = (
            log_probabilities(engine, tokens, adapter)
            for adapter in (ref, AdapterRef("quantized", 1, out), None)
        )
    finally:
        engine.shutdown()
    table = Table("from the adapter", "log probabilities: largest", "mean", "KL: largest", "mean")
    table.add_row("quantised", *_cells(drift(original, quantized)))
    table.add_row("bare base model", *_cells(drift(original, base)))
    return table


def _cells(found: Drift) -> tuple[str, ...]:
    numbers = (found.largest, found.mean, found.largest_divergence, found.mean_divergence)
    return tuple(f"{number:.2g}" for number in numbers)
