"""The same work through PEFT's mixed-batch generation and through the engine, side by side.

    python -m benchmarks.vs_peft

A batch of 16 prompts of 128 random tokens, 64 new tokens each, greedy, bfloat16, on the bare model
and with 1, 8 and 16 distinct adapters of rank 8 to 64 on all linear layers; the same for a single
prompt; and beside a process that keeps a core busy. Each side has a process of its own and they
take turns, so that a machine that drifts drifts for both; the ratio is of medians.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import peft
import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from benchmarks.comparison import ENGINE, PEFT, WITH_ADAPTERS, Row, floors, measure, show
from benchmarks.floor import Work
from benchmarks.machine import describe_machine
from benchmarks.machine_speed import MachineSpeed, measure_speed, median_speed
from benchmarks.peft_side import PeftSide, write_adapters
from benchmarks.sides import EngineSide, MakeSide, Side
from polydelta.engine.models.checkpoint import open_checkpoint
from polydelta.engine.models.config import ModelConfig

BATCH, PROMPT_TOKENS, NEW_TOKENS = 16, 128, 64
RANKS = (8, 16, 32, 64) * 4
# Beside a busy process PEFT takes more than a second for a token of a batch.
BUSY_NEW_TOKENS = 16
RESULT = Path(__file__).parent / "results" / "vs_peft.json"


@dataclass(frozen=True)
class Comparison:
    rows: Sequence[Row]
    # Names, which are those of their folders.
    adapters: Sequence[str]
    model: ModelConfig
    speed: MachineSpeed

    @property
    def floors(self) -> dict[str, float]:
        """Row -> tokens a second."""
        return floors(self.rows, self.model, self.speed)

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": describe_machine() | {"peft": peft.__version__} | self.speed.to_json(),
            "rows": [row.to_json(self.floors[row.name]) for row in self.rows],
        }


def batch(adapters: int, new_tokens: int = NEW_TOKENS) -> Work:
    return Work(BATCH, PROMPT_TOKENS, new_tokens, RANKS[:adapters])


def single(adapters: int) -> Work:
    return Work(1, PROMPT_TOKENS, NEW_TOKENS, RANKS[:adapters])


def make_rows(rounds: int) -> list[Row]:
    """rounds: of most; fewer where PEFT takes very long, more where two engines are compared that
    should not differ."""
    few = max(1, rounds - 1)
    return [
        Row("base only", batch(0), ENGINE, PEFT, rounds, 2.3, 3.0),
        Row(
            "base only, adapters on",
            batch(0),
            WITH_ADAPTERS,
            ENGINE,
            2 * rounds,
            0.99,
            1.0,
        ),
        Row("1 adapter", batch(1), WITH_ADAPTERS, PEFT, rounds, 3.0, 4.0),
        Row("8 adapters", batch(8), WITH_ADAPTERS, PEFT, few, 5.0, 7.0),
        Row("16 distinct adapters", batch(16), WITH_ADAPTERS, PEFT, few, 6.0, 9.0),
        Row("single stream, base", single(0), ENGINE, PEFT, rounds, 2.3, 3.5),
        Row("single stream, 1 adapter", single(1), WITH_ADAPTERS, PEFT, rounds),
        Row("base only, a core busy", batch(0, BUSY_NEW_TOKENS), ENGINE, PEFT, 1, busy=1),
        Row(
            "16 distinct, a core busy",
            batch(16, BUSY_NEW_TOKENS),
            WITH_ADAPTERS,
            PEFT,
            1,
            busy=1,
        ),
    ]


def compare(rounds: int, folder: Path, console: Console) -> Comparison:
    """folder: where the adapters go."""
    rows, model = make_rows(rounds), open_checkpoint(None).config
    console.print("Writing adapters, starting both sides.")
    names = write_adapters(folder, RANKS)
    speeds = [measure_speed(model)]
    makers: dict[str, MakeSide] = {PEFT: PeftSide, ENGINE: EngineSide, WITH_ADAPTERS: EngineSide}
    sides = {name: Side(make, folder, names) for name, make in makers.items()}
    # From here on its pool has all of them.
    sides[WITH_ADAPTERS].run([[1, 2, 3]] * len(names), names, 1)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as shown:
        task = shown.add_task("Measuring", total=sum(row.rounds for row in rows))
        for number, row in enumerate(rows, start=1):
            shown.update(task, description=row.name)
            measure(row, sides, names, lambda: shown.advance(task))
            if number % 3 == 0:
                speeds.append(measure_speed(model))
    for side in sides.values():
        side.close()
    return Comparison(rows, names, model, median_speed(speeds))


def main(
    rounds: Annotated[int, typer.Option(help="Counted rounds of most rows.", min=1)] = 3,
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")] = RESULT,
) -> None:
    """Compares the engine with PEFT's mixed-batch generation."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        comparison = compare(rounds, Path(folder), console)
    console.print(show(comparison.rows, comparison.floors))
    result = {"benchmark": "vs_peft", "date": time.strftime("%Y-%m-%d")} | comparison.to_json()
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
