"""Time of decode steps with each KV format and selection, against native full attention.

    python -m benchmarks.kv_speed

The default model's whole step, as the engine runs it: attention, everything else, sampling; with
pages that close now and then. Native full attention and the other way take turns, there and back
(A B B A), and the median of the rounds' ratios counts. Contexts are not computed: pages hold random
keys and values, of which any are chosen as fast. Told as well is what the largest load holds in
memory once its prompts are done, and how many tokens the default pool has room for.

Selections have budgets for 4,096 tokens, nearly all of them a prompt. XAttention is for prompts:
answers are not concerned.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.progress import Progress
from rich.table import Table

from benchmarks.kv_reader import Way
from benchmarks.kv_stepping import STAGGER, Stepping
from benchmarks.kv_ways import NATIVE, key, named, ways
from benchmarks.machine import describe_machine
from benchmarks.wide_console import wide_console
from polydelta.engine.config import EngineConfig
from polydelta.engine.device import limits_for
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.checkpoint import open_checkpoint
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.weights import Weights
from polydelta.kernels.ops import kernels_for

RESULT = Path(__file__).parent / "results" / "kv_speed.json"
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
# Tokens over those of native KV, at least.
BARS = {"int8": 1.9, "fp8": 1.9, "int4": 3.5, "mustafar-70": 1.8}
# From so many tokens on, selections are to be faster than native full attention.
FASTER_FROM = 4096
WARMING = 2


@dataclass(frozen=True)
class Size:
    contexts: Sequence[int]
    # What is compared; and steps of a turn, of which a round has two for each side.
    batches: Sequence[int]
    turns: Sequence[int]
    rounds: int
    # That selections have budgets for.
    window: int

    @property
    def loads(self) -> list[Load]:
        return [
            Load(context, batch, turn)
            for context in self.contexts
            for batch, turn in zip(self.batches, self.turns, strict=True)
        ]


@dataclass(frozen=True)
class Load:
    context: int
    batch: int
    # Steps of a turn.
    turn: int


FULL = Size((1024, 4096, 8192), (1, 8), (8, 4), 4, window=4096)
QUICK = Size((128, 256), (1, 2), (2, 2), 1, window=256)


@dataclass
class Rounds:
    """Seconds of a step, in each round, of one way and of native full attention beside it."""

    load: Load
    ours: list[float] = field(default_factory=list)
    natives: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        each = zip(self.ours, self.natives, strict=True)
        return statistics.median(ours / native for ours, native in each)

    def to_json(self) -> dict[str, Any]:
        return {
            "context": self.load.context,
            "batch": self.load.batch,
            "step_ms": round(1e3 * statistics.median(self.ours), 3),
            "native_step_ms": round(1e3 * statistics.median(self.natives), 3),
            "ratio": round(self.ratio, 4),
            "rounds_step_ms": [round(1e3 * one, 3) for one in self.ours],
            "rounds_native_step_ms": [round(1e3 * one, 3) for one in self.natives],
        }


@dataclass
class Outcome:
    """Of one way."""

    way: Way
    page_tokens: int
    # Tokens in the bytes of a page, and in the default pool, over those of native KV.
    page_ratio: float
    pool_tokens: int
    pool_ratio: float
    rounds: list[Rounds]
    # Of the largest load, and over what native full attention holds.
    held_bytes: int
    held_ratio: float

    @property
    def bar(self) -> float | None:
        return BARS.get(key(self.way))

    def holds(self, ratio: float) -> bool | None:
        """Whether a ratio of tokens reaches the bar; None without one."""
        return None if self.bar is None else ratio >= self.bar

    def faster(self, rounds: Rounds) -> bool | None:
        """Whether a selection is, where it must be."""
        is_selection = self.way.format == "native" and self.way.selection != "full"
        if not is_selection or rounds.load.context < FASTER_FROM:
            return None
        return rounds.ratio < 1

    def to_json(self) -> dict[str, Any]:
        return {
            "way": self.way.name,
            "format": self.way.format,
            "selection": self.way.selection,
            "page_tokens": self.page_tokens,
            "page_ratio": round(self.page_ratio, 4),
            "pool_tokens": self.pool_tokens,
            "pool_ratio": round(self.pool_ratio, 4),
            "bar": self.bar,
            "page_met": self.holds(self.page_ratio),
            "pool_met": self.holds(self.pool_ratio),
            "held_bytes": self.held_bytes,
            "held_ratio": round(self.held_ratio, 4),
            "loads": [one.to_json() | {"faster": self.faster(one)} for one in self.rounds],
        }


def compare(native: Stepping, other: Stepping, load: Load, rounds: int) -> Rounds:
    """Both take turns at the same load."""
    steps = WARMING + 2 * load.turn * rounds
    for one in (native, other):
        one.begin(load.batch, load.context, steps)
        for _ in range(WARMING):
            one.step()
    measured = Rounds(load)
    for _ in range(rounds):
        seconds = {native: 0.0, other: 0.0}
        for one in (native, other, other, native):
            seconds[one] += sum(one.step() for _ in range(load.turn))
        measured.natives.append(seconds[native] / (2 * load.turn))
        measured.ours.append(seconds[other] / (2 * load.turn))
    return measured


def measure(
    decoder: Decoder, size: Size, chosen: Sequence[Way], advance: Callable[[str], None]
) -> list[Outcome]:
    """advance: given what is measured next, for each way and load."""
    native = _stepping(decoder, size, NATIVE)
    return [_measure(decoder, size, native, way, advance) for way in chosen]


def _measure(
    decoder: Decoder, size: Size, native: Stepping, way: Way, advance: Callable[[str], None]
) -> Outcome:
    other = _stepping(decoder, size, way)
    rounds = []
    for load in size.loads:
        advance(f"{way.name}: {load.context} tokens, batch {load.batch}")
        rounds.append(compare(native, other, load, size.rounds))
    tokens, pool_tokens = other.spec.block_size, _pool_tokens(other.spec)
    # Of the last load, which is the largest.
    held = other.held_bytes
    return Outcome(
        way,
        tokens,
        native.spec.token_bytes / other.spec.token_bytes,
        pool_tokens,
        pool_tokens / _pool_tokens(native.spec),
        rounds,
        held,
        held / native.held_bytes,
    )


def _stepping(decoder: Decoder, size: Size, way: Way) -> Stepping:
    return Stepping(decoder, way, DTYPE, max(size.contexts), max(size.batches))


def _pool_tokens(spec: KVSpec) -> int:
    """In the default pool of a CPU."""
    limits = limits_for(CPU, EngineConfig())
    assert limits.pool_bytes is not None
    return spec.pages_in(limits.pool_bytes, limits.max_batch_size) * spec.block_size


def show(outcomes: Sequence[Outcome], judged: bool) -> Table:
    """judged: whether times and sizes mean something."""
    table = Table(title="Decode steps, over native full attention's", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for one in outcomes[0].rounds:
        heading = f"{one.load.context}\nx{one.load.batch}"
        table.add_column(heading, justify="right", no_wrap=True)
    for column in ("held", "page", "pool", "bar"):
        table.add_column(column, justify="right", no_wrap=True)
    natives = [f"{one.to_json()['native_step_ms']:.1f}" for one in outcomes[0].rounds]
    table.add_row("native, ms", *natives, "", "", "", "")
    for outcome in outcomes:
        held, page, pool = outcome.held_ratio, outcome.page_ratio, outcome.pool_ratio
        table.add_row(
            outcome.way.name,
            *(
                _marked(f"{one.ratio:.2f}", outcome.faster(one) if judged else None)
                for one in outcome.rounds
            ),
            f"{held:.2f}",
            _marked(f"{page:.2f}", outcome.holds(page)),
            _marked(f"{pool:.2f}", outcome.holds(pool)),
            "" if outcome.bar is None else f"{outcome.bar:g}",
        )
    table.caption = (
        "context and batch; held: bytes of the largest load, its open pages among them, over "
        "native's; page, pool: tokens in a page, and in the default pool less the open pages of "
        "its largest batch, over native's; bar: of both"
    )
    return table


def _marked(text: str, met: bool | None) -> str:
    return text if met is None else f"[{'green' if met else 'red'}]{text}[/]"


def main(
    only: Annotated[str | None, typer.Option(help='Ways, such as "int8,quest,int4+quest".')] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes, to see that it runs; judges nothing.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")] = RESULT,
) -> None:
    """Times decode steps of every KV format and selection beside native full attention."""
    console, size = wide_console(), QUICK if quick else FULL
    each = [way for way in ways(size.window, size.window) if way.prefill == "full"]
    chosen = [way for way in named(each, only) if way != NATIVE]
    checkpoint, kernels = open_checkpoint(None), kernels_for(CPU, DTYPE)
    kernels.enter_thread()
    weights = Weights(checkpoint.tensors, DTYPE, lambda *_: None)
    decoder = Decoder(checkpoint.config, weights, kernels, max(size.contexts), DTYPE)
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(chosen) * len(size.loads))
        done = -1

        def advance(what: str) -> None:
            nonlocal done
            done += 1
            progress.update(task, description=what, completed=done)

        outcomes = measure(decoder, size, chosen, advance)
        progress.update(task, completed=done + 1)
    console.print(show(outcomes, judged=not quick))
    result = {
        "benchmark": "kv_speed",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "model": checkpoint.id,
        "dtype": str(DTYPE).removeprefix("torch."),
        "work": vars(size) | {"stagger": STAGGER, "warming_steps": WARMING},
        "ways": [outcome.to_json() for outcome in outcomes],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
