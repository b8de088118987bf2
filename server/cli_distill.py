"""`polydelta adapters distill-delta`: an adapter made of a full fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from polydelta.server.arguments import Dtype, OutFolder
from polydelta.server.cli_import import CutVocabulary, kept_whole, open_pair
from polydelta.server.facts import facts_table, human_size
from polydelta.server.progress_bar import progress_bar

if TYPE_CHECKING:
    from polydelta.adapters_store.base_layout import BaseLayout
    from polydelta.adapters_store.distilling import Distilled


def distill_delta(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="The model that is served: a folder, a GGUF file or a hub id."
        ),
    ],
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="A full fine-tune of it, named likewise.")
    ],
    out: OutFolder,
    dtype: Annotated[
        Dtype, typer.Option(help="Number format of the embedding and the head, where they differ.")
    ] = Dtype.BFLOAT16,
    cut_vocabulary: CutVocabulary = False,
) -> None:
    """Make an adapter of a full fine-tune, with one bit for each weight (BitDelta).

    Of every linear layer's change it keeps the signs, and their mean size as one scale. Norms,
    biases, embedding and head are kept whole where they differ from the base's. A tuned model thus
    costs about a sixteenth of its bytes in 16 bits, and what its embedding takes.

    The answers are near those of the tuned model, not the same: try them before you serve them. The
    errors that are reported are relative to the layers' changes (Frobenius norm); around 60% is
    usual, for so much one bit leaves out of normally distributed numbers.

    [bold]Examples[/bold]

    [cyan]polydelta adapters distill-delta Qwen/Qwen2.5-7B Qwen/Qwen2.5-7B-Instruct ./chat[/cyan]
    a chat model as an adapter of its base
    """
    # Here and not above: `polydelta --help` must not wait for torch.
    import torch

    from polydelta.adapters_store.distilling import distill

    _, layout, tuned_layout = open_pair(base, tuned)
    with progress_bar("distilling") as report:
        distilled = distill(layout, tuned_layout, getattr(torch, dtype), cut_vocabulary, report)
    distilled.adapter.write(out, base)
    Console().print(_facts(out, distilled, tuned_layout))


def _facts(out: Path, distilled: Distilled, tuned: BaseLayout) -> Table:
    """What was written, for people."""
    from polydelta.adapters_store.importing.full_model import num_weights
    from polydelta.adapters_store.inspection import inspect

    full, delta = 2 * num_weights(tuned), inspect(out).bytes
    facts = {
        "folder": str(out),
        "tuned model in 16 bits": human_size(full),
        "delta": f"{human_size(delta)}, {full / delta:.1f} times smaller",
        "linear layers": str(len(distilled.adapter.modules)),
        "kept whole": kept_whole(distilled.adapter),
    }
    if errors := distilled.errors:
        worst = max(errors, key=errors.__getitem__)
        facts["mean error"] = f"{distilled.mean_error:.2%} of a layer's change"
        facts["worst layer"] = f"{worst}: {errors[worst]:.2%}"
    return facts_table(facts)
