"""What KV formats, selections and prefill methods cost in quality, against native full attention.

    python -m benchmarks.kv_quality

The default model, with and without a sample adapter, reads Python's own documentation
(`pydoc_data.topics`, which comes with Python under the PSF licence) in windows of 4,096 tokens: the
first half of each is a prompt, the second the answer, whose tokens are given. Everything is read as
it would be in serving: by the engine's own rules, pages and kernels. Told are

- perplexity of the answers' tokens, and its standard error from window to window;
- of every sixteenth the KL divergence of the next token's distribution, and whether the most likely
  token is the same;
- how many digits of keys are found again that were hidden in 512 to 8,192 tokens of the same text:
  one key alone ("needle"), or eight that differ in a name ("multi-key").

Selections have budgets for 4,096 tokens. The label channels of double sparsity are found on the
text's end, which nothing else reads. h2o evicts behind each token, so it computes them one by one,
and reads a sixth of the windows. The adapter reads fewer windows and texts than the base.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from benchmarks.kv_measuring import BARS, Outcome, Truth, Work, measure
from benchmarks.kv_quality_plot import Point, draw, save
from benchmarks.kv_quality_tables import cost_table, retrieval_table
from benchmarks.kv_reader import Model, Way
from benchmarks.kv_retrieval import haystacks
from benchmarks.kv_texts import LICENCE, NAME, Text
from benchmarks.kv_ways import named, ways
from benchmarks.machine import describe_machine
from benchmarks.wide_console import wide_console
from polydelta.engine.kv_calibrating import calibrate
from polydelta.engine.models.checkpoint import Checkpoint, open_checkpoint
from polydelta.kernels.ops import Kernels, kernels_for

RESULT = Path(__file__).parent / "results" / "kv_quality.json"
SAMPLES = Path(__file__).parents[1] / "adapters_store" / "samples"
CPU, DTYPE = torch.device("cpu"), torch.bfloat16


@dataclass(frozen=True)
class Size:
    """How much is read. With the adapter, a share of the windows and fewer texts with keys."""

    window: int
    windows: int
    lengths: Sequence[int]
    depths: Sequence[float]
    adapter_windows: int
    adapter_lengths: Sequence[int]
    adapter_depths: Sequence[float]
    calibrated: int | None = None
    # Native tokens of a page; None for what suits each format.
    block_size: int | None = None


FULL = Size(4096, 13, (512, 1024, 2048, 4096, 8192), (0.1, 0.5, 0.9), 3, (512, 2048), (0.5,))
QUICK = Size(256, 2, (256, 320), (0.5,), 1, (256,), (0.5,), calibrated=512)


class Quality:
    """Measures ways, base first and then the adapter."""

    def __init__(
        self, checkpoint: Checkpoint, size: Size, chosen: Sequence[Way], adapter: Path
    ) -> None:
        """Raises ValueError for more windows than the text has."""
        self.checkpoint = checkpoint
        self.text = Text.read(checkpoint.tokenizer)
        self._size = size
        self._chosen = chosen
        self._kernels: Kernels = kernels_for(CPU, DTYPE)
        self.models: Mapping[str, tuple[Path | None, Work]] = {
            checkpoint.id: (None, self._work(size.windows, size.lengths, size.depths)),
            f"{checkpoint.id} with {adapter.name}": (
                adapter,
                self._work(
                    min(size.windows, size.adapter_windows),
                    size.adapter_lengths,
                    size.adapter_depths,
                ),
            ),
        }

    @property
    def tokens(self) -> int:
        """That are read in all, but for calibration."""
        return sum(work.tokens(way) for _, work in self.models.values() for way in self._chosen)

    def measure(self, advance: Callable[[str, int], None]) -> dict[str, list[Outcome]]:
        """By model. advance: given what is measured, and tokens that were read."""
        self._kernels.enter_thread()
        most = max(self._size.window, *self._size.lengths)
        labels: Tensor | None = None
        outcomes: dict[str, list[Outcome]] = {}
        for name, (adapter, work) in self.models.items():
            model = Model(self.checkpoint, self._kernels, DTYPE, most, adapter)
            if labels is None:
                labels = self._labels(model)
            truth: Truth = []
            outcomes[name] = []
            for way in self._chosen:
                tell = _teller(advance, f"{name}: {way.name}")
                tell(0)
                outcomes[name].append(measure(model, way, labels, work, truth, tell))
        return outcomes

    def _work(self, windows: int, lengths: Sequence[int], depths: Sequence[float]) -> Work:
        return Work(
            self.text.windows(windows, self._size.window),
            haystacks(self.checkpoint.tokenizer, self.text.measured, lengths, depths),
            self._size.block_size,
        )

    def _labels(self, base: Model) -> Tensor:
        """Of the base model, as in serving."""
        tokens = torch.tensor(self.text.for_calibration[: self._size.calibrated])
        base.deltas.begin(())
        return calibrate(base.decoder, tokens, DTYPE)


def _teller(advance: Callable[[str, int], None], what: str) -> Callable[[int], None]:
    return lambda tokens: advance(what, tokens)


def points(outcomes: Sequence[Outcome]) -> list[Point]:
    """All but native full attention."""
    native, *others = outcomes
    made = []
    for one in others:
        cost, error = one.cost(native)
        is_format = one.way.format != "native"
        is_selection = (one.way.selection, one.way.prefill) != ("full", "full")
        made.append(
            Point(one.way.name, one.read_share, cost, error or 0.0, is_format, is_selection)
        )
    return made


def main(
    windows: Annotated[
        int | None, typer.Option(help="Of 4,096 tokens, that the base reads; by default 13.", min=2)
    ] = None,
    adapter: Annotated[str, typer.Option(help="A sample adapter.")] = "iso-date",
    adapter_windows: Annotated[
        int | None, typer.Option(help="That are read with it; by default 3.", min=1)
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help='Ways, such as "int8,quest,int4+quest"; native full attention always.'),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Native tokens of a page: the open one is not compressed. Without it, what suits "
            "each format.",
            min=1,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes, to see that it runs; judges nothing.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Where the JSON result goes; the plot goes beside it.")
    ] = RESULT,
) -> None:
    """Perplexity, divergence and key retrieval of every KV format and selection."""
    console, size = wide_console(), replace(QUICK if quick else FULL, block_size=block_size)
    chosen = named(ways(size.window, size.window // 2), only)
    checkpoint = open_checkpoint(None)
    if windows is not None:
        size = replace(size, windows=windows)
    if adapter_windows is not None:
        size = replace(size, adapter_windows=adapter_windows)
    if not (SAMPLES / adapter).is_dir():
        samples = sorted(folder.name for folder in SAMPLES.iterdir() if folder.is_dir())
        raise typer.BadParameter(f"{adapter!r} is not one of {', '.join(samples)}.")
    try:
        quality = Quality(checkpoint, size, chosen, SAMPLES / adapter)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    read = size.windows * size.window
    console.print(
        f"Text: {NAME}, {LICENCE}: {len(quality.text.ids):,} tokens, of which the first {read:,} "
        f"are read in windows of {size.window:,}"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=quality.tokens)
        outcomes = quality.measure(
            lambda what, tokens: progress.update(task, description=what, advance=tokens)
        )
    for name, each in outcomes.items():
        console.print(cost_table(name, each, judged=not quick), retrieval_table(name, each))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(_result(quality, size, outcomes), indent=2) + "\n")
    each_model = {name: points(each) for name, each in outcomes.items()}
    save(draw(each_model, () if quick else BARS.values()), output.with_suffix(".svg"))


def _result(
    quality: Quality, size: Size, outcomes: Mapping[str, Sequence[Outcome]]
) -> dict[str, Any]:
    return {
        "benchmark": "kv_quality",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "model": quality.checkpoint.id,
        "dtype": str(DTYPE).removeprefix("torch."),
        "text": {"name": NAME, "licence": LICENCE, "tokens": len(quality.text.ids)},
        "work": vars(size) | {"prompt": size.window // 2},
        "models": {name: [one.to_json(each[0]) for one in each] for name, each in outcomes.items()},
    }


if __name__ == "__main__":
    typer.run(main)
