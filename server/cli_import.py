"""`polydelta adapters import`: folders made of what other projects save of a fine-tune."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from polydelta.server.arguments import BaseModel, OutFolder
from polydelta.server.base_models import open_base
from polydelta.server.facts import facts_table, human_size
from polydelta.server.progress_bar import progress_bar
from polydelta.server.settings import load_settings

if TYPE_CHECKING:
    from polydelta.adapters_store.base_layout import BaseLayout
    from polydelta.adapters_store.importing.new_adapter import NewAdapter
    from polydelta.engine.models.checkpoint import Checkpoint

CutVocabulary = Annotated[
    bool,
    typer.Option(
        "--cut-vocabulary",
        help="Leave out tokens that the base has not, such as padding. Without it they are an"
        " error, for no adapter can serve them.",
    ),
]

imports = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@imports.callback()
def import_adapter() -> None:
    """Make an adapter's folder of what another project saves.

    The folder can be served, uploaded with `push`, and inspected as any other. Pickles are opened
    here, by you, and for tensors alone; a server never opens one.
    """


@imports.command("s2ft")
def from_s2ft(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="The tuned model: a folder or a hub id.")
    ],
    out: OutFolder,
    model: BaseModel = None,
    cut_vocabulary: CutVocabulary = False,
) -> None:
    """Import a model tuned with S2FT, which saves it whole and with its channels in another order.

    Finds that order by the weights that S2FT does not train, and keeps the rows and columns that
    differ from the base's: exactly the tuned model. Both models must be at hand in 16 bits, for
    quantised weights are not equal.

    [bold]Examples[/bold]

    [cyan]polydelta adapters import s2ft ./outs/math ./math --model ./base --cut-vocabulary[/cyan]
    what its training script has saved, less the tokens that it appends for padding
    """
    settings = load_settings(model=model)
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.adapters_store.importing.s2ft_checkpoint import import_s2ft

    base, layout, tuned = open_pair(settings.model, source)
    with progress_bar("matching") as report:
        adapter = import_s2ft(layout, tuned, cut_vocabulary, report)
    _write(adapter, out, settings.model or base.id)


@imports.command("sft")
def from_sft(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="pytorch_diff.bin, or the folder that it is in."),
    ],
    out: OutFolder,
    model: BaseModel = None,
) -> None:
    """Import a composable sparse fine-tuning (cambridgeltl/composable-sft), exactly.

    A task and a language are two adapters: name both in a request, and the server adds them up.

    [bold]Examples[/bold]

    [cyan]polydelta adapters import sft ./task-sft ./adapters/task --model ./base[/cyan]
    """
    settings = load_settings(model=model)
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.adapters_store.importing.sft_file import import_sft

    # The weights as they are stored.
    base, layout = open_base(settings.model, "float32")
    _write(import_sft(source, layout), out, settings.model or base.id)


@imports.command("bitdelta")
def from_bitdelta(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="The diff.pt that BitDelta's code has saved.")
    ],
    out: OutFolder,
    model: BaseModel = None,
    cut_vocabulary: CutVocabulary = False,
) -> None:
    """Import a BitDelta (FasterDecoding/BitDelta), with the scales that were distilled.

    Of a full fine-tune without one, `polydelta adapters distill-delta` makes it.

    [bold]Examples[/bold]

    [cyan]polydelta adapters import bitdelta ./diff.pt ./adapters/chat --model ./base[/cyan]
    """
    settings = load_settings(model=model)
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.adapters_store.importing.bitdelta_file import import_bitdelta

    # The weights as they are stored.
    base, layout = open_base(settings.model, "float32")
    _write(import_bitdelta(source, layout, cut_vocabulary), out, settings.model or base.id)


def open_pair(base: str | None, tuned: str) -> tuple[Checkpoint, BaseLayout, BaseLayout]:
    """The base and its layout, and the tuned model's: both with weights, rounded to the tuned
    model's dtype, in which a change of nothing is 0. Raises ModelError."""
    from polydelta.engine.models.base_weights import checkpoint_layout
    from polydelta.engine.models.checkpoint import open_checkpoint

    ours, theirs = open_checkpoint(base), open_checkpoint(tuned)
    dtype = theirs.tensors.read("model.layers.0.self_attn.q_proj.weight").dtype
    return ours, checkpoint_layout(ours, dtype), checkpoint_layout(theirs, dtype)


def kept_whole(adapter: NewAdapter) -> str:
    """The modules that an adapter replaces, by the last part of their names."""
    counts = Counter(module.rpartition(".")[2] for module in adapter.replaced)
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "nothing"


def _write(adapter: NewAdapter, out: Path, base_name: str) -> None:
    """And says what was written."""
    from polydelta.adapters_store.inspection import inspect

    adapter.write(out, base_name)
    summary = inspect(out)
    facts = {
        "folder": str(out),
        "format": summary.format,
        "linear layers": str(len(adapter.modules)),
        "kept whole": kept_whole(adapter),
        "size": human_size(summary.bytes),
    }
    Console().print(facts_table(facts))
