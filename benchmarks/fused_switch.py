"""Fused mode: how long it takes to switch the weights from one adapter to another of its kind.

    python -m benchmarks.fused_switch

SHiRA with 1% of the entries, at random, against LoRA of rank 32; one 4096 x 4096 layer, and all
linear layers of the default model; bfloat16 and float32; weights as torch has them (plain) and as
the engine has them (packed for oneDNN). A switch takes the old adapter out and puts the new one in.

Both kinds start from what was made ready when the adapter was loaded and takes about as much memory
as the adapter: entries with their old and new values, or factors in the order that the product
likes. A LoRA that was merged beforehand is there by an assignment, and costs a copy of the weights
for each adapter: shown, and not compared. All ways take turns, in an order that changes. A ratio is
the median over the turns of the fastest LoRA to the fastest sparse way.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.switch_ways import RANK, SHARE, Layer, Way, make_layer, packed_ways, plain_ways
from polydelta.adapters_store.base_layout import FusedLinear, LinearPart
from polydelta.engine.models.checkpoint import Checkpoint, open_checkpoint
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.models.weights import Weights
from polydelta.kernels.cpu import native

SIZE, BAR = 4096, 5.0
DTYPES = (torch.bfloat16, torch.float32)
RESULT = Path(__file__).parent / "results" / "fused_switch.json"


@dataclass(frozen=True)
class Point:
    """All ways to switch the same weights."""

    scope: str
    dtype: str
    layout: str
    ways: list[Way]

    def best(self, side: str) -> Way:
        return min((way for way in self.ways if way.side == side), key=lambda way: way.median)

    def ratio(self, way: Way) -> float:
        """How many times longer than the fastest sparse way it takes."""
        turns = zip(way.seconds, self.best("sparse").seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in turns)

    def to_json(self) -> dict[str, Any]:
        return {
            "scope": self.scope,
            "dtype": self.dtype,
            "layout": self.layout,
            "ratio": round(self.ratio(self.best("LoRA")), 2),
            "ways": [
                {
                    "side": way.side,
                    "name": way.name,
                    "exact": way.exact,
                    "median_ms": round(way.median * 1e3, 3),
                    "min_ms": round(min(way.seconds) * 1e3, 3),
                    "max_ms": round(max(way.seconds) * 1e3, 3),
                    "to_sparse": round(self.ratio(way), 2),
                }
                for way in self.ways
            ],
        }


def one_layer(dtype: torch.dtype) -> list[Layer]:
    linear = FusedLinear("linear", SIZE, (LinearPart("linear", SIZE),))
    return [make_layer((torch.randn(SIZE, SIZE) * 0.02).to(dtype), linear)]


def whole_model(checkpoint: Checkpoint, dtype: torch.dtype) -> list[Layer]:
    layout = base_layout(checkpoint.config, checkpoint.id)
    weights = Weights(checkpoint.tensors, dtype, lambda *_: None)
    layers = []
    for number in range(layout.num_layers):
        for linear in layout.linears:
            parts = [
                weights.take(
                    f"{layout.module_name(number, part.name)}.weight",
                    (part.out_features, linear.in_features),
                )
                for part in linear.parts
            ]
            layers.append(make_layer(torch.cat(parts), linear))
    return layers


def points(checkpoint: Checkpoint) -> Iterator[Point]:
    """One at a time: the weights of all would not fit beside each other everywhere."""
    library = native.load()
    scopes: list[tuple[str, Callable[[torch.dtype], list[Layer]]]] = [
        (f"{SIZE} x {SIZE}", one_layer),
        (checkpoint.id, lambda dtype: whole_model(checkpoint, dtype)),
    ]
    for scope, make in scopes:
        for dtype in DTYPES:
            layers, name = make(dtype), str(dtype).removeprefix("torch.")
            yield Point(scope, name, "plain", plain_ways(layers, library))
            yield Point(scope, name, "packed", packed_ways(layers, library))


@torch.inference_mode()
def measure(point: Point, turns: int) -> None:
    order, shuffle = list(point.ways), random.Random(0)
    for turn in range(-1, turns):  # the first warms up
        shuffle.shuffle(order)
        for way in order:
            began = time.perf_counter()
            way.switch(turn % 2)
            if turn >= 0:
                way.seconds.append(time.perf_counter() - began)


def show_ways(point: Point) -> Table:
    table = Table(title=f"{point.scope}, {point.dtype}, {point.layout}")
    for column in ("", "exact", "ms", "least", "to sparse"):
        table.add_column(column, justify="left" if not column else "right")
    for way in point.ways:
        name = way.name if way.side is None else f"{way.side}: {way.name}"
        exact = "yes" if way.exact else "no"
        style = "dim" if way.side is None else ""
        least = f"{min(way.seconds) * 1e3:.2f}"
        ratio = f"{point.ratio(way):.1f}x"
        table.add_row(name, exact, f"{way.median * 1e3:.2f}", least, ratio, style=style)
    return table


def show_ratios(measured: list[Point]) -> Table:
    table = Table(title=f"A switch: LoRA r{RANK} to {SHARE:.0%} sparse, the fastest way of each")
    for column in ("", "dtype", "weights", "LoRA, ms", "sparse, ms", "ratio", "bar"):
        table.add_column(column, justify="left" if not column else "right")
    for point in measured:
        low_rank, sparse = point.best("LoRA"), point.best("sparse")
        ratio = point.ratio(low_rank)
        table.add_row(
            point.scope,
            point.dtype,
            point.layout,
            f"{low_rank.median * 1e3:.2f}",
            f"{sparse.median * 1e3:.2f}",
            f"[{'green' if ratio >= BAR else 'red'}]{ratio:.1f}x[/]",
            f"{BAR:.0f}x",
        )
    return table


def main(
    turns: Annotated[int, typer.Option(help="Counted switches of each way.", min=1)] = 20,
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")] = RESULT,
) -> None:
    """Times switches between adapters in fused mode, SHiRA against LoRA."""
    console, measured = Console(), []
    torch.manual_seed(0)
    with Progress(console=console) as progress:
        task = progress.add_task("Measuring", total=4 * len(DTYPES))
        for point in points(open_checkpoint(None)):
            measure(point, turns)
            for way in point.ways:
                way.switch = lambda _: None  # lets go of the weights
            console.print(show_ways(point))
            measured.append(point)
            progress.advance(task)
    console.print(show_ratios(measured))
    result = {
        "benchmark": "fused_switch",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "work": {"rank": RANK, "share": SHARE, "turns": turns},
        "points": [point.to_json() for point in measured],
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
