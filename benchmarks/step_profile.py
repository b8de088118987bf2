"""Where the time of a step goes: prefills and decode steps, without and with adapters.

    python -m benchmarks.step_profile

The default model in bfloat16, by the clock (`step_clock.py`), beside the floor (`floor.py`). With
`--operators` the same steps once more under PyTorch's profiler.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.floor import Cost, Work, step_cost
from benchmarks.machine import describe_machine
from benchmarks.machine_speed import MachineSpeed, measure_speed, median_speed
from benchmarks.profiled_engine import ProfiledEngine
from benchmarks.step_clock import ATTENTION, DELTAS, HEAD, LINEARS, TimedStep
from polydelta.engine.models.config import ModelConfig

RESULT = Path(__file__).parent / "results" / "step_profile.json"
BATCH, PROMPT_TOKENS, NEW_TOKENS = 16, 128, 32
RANKS = (8, 16, 32, 64) * 4
# Requests that run together; they give a prefill step and decode steps. The one adapter is the
# first of the sixteen.
WORKS = {
    "16 sequences": Work(BATCH, PROMPT_TOKENS, NEW_TOKENS),
    "16 sequences, an adapter each": Work(BATCH, PROMPT_TOKENS, NEW_TOKENS, RANKS),
    "1 sequence": Work(1, PROMPT_TOKENS, NEW_TOKENS),
    "1 sequence with an adapter of rank 8": Work(1, PROMPT_TOKENS, NEW_TOKENS, RANKS[:1]),
}


@dataclass(frozen=True)
class Profile:
    """One kind of step: its usual time by part, and the least that each part can take."""

    name: str
    # How many steps `parts` is the mean of.
    steps: int
    # Part -> seconds, the longest first.
    parts: dict[str, float]
    # Part -> seconds, for those that have any.
    floors: dict[str, float]
    # Of the step as a whole, in which reading and computing overlap.
    floor: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "steps": self.steps,
            "ms": round(self.seconds * 1e3, 3),
            "floor_ms": round(self.floor * 1e3, 3),
            "parts_ms": {part: round(s * 1e3, 3) for part, s in self.parts.items()},
            "parts_floor_ms": {part: round(s * 1e3, 3) for part, s in self.floors.items()},
        }


def profiles_of(
    name: str, work: Work, steps: Sequence[TimedStep], model: ModelConfig, speed: MachineSpeed
) -> list[Profile]:
    """Of the prefill, and of the decode steps that all sequences take part in."""
    prompt, decoded = work.prompt_tokens, work.prompt_tokens + work.new_tokens // 2
    kinds = {
        f"prefill of {name}": (work.prompt_tokens, prompt),
        f"decode step of {name}": (1, decoded),
    }
    profiles = []
    for kind, (tokens, context) in kinds.items():
        alike = [s for s in steps if s.sequences == work.batch and s.tokens == work.batch * tokens]
        cost = step_cost(model, work, tokens, context)
        floors = {
            part: one.seconds(speed)
            for part, one in (
                (LINEARS, cost.linears),
                (HEAD, cost.head),
                (DELTAS, cost.adapters),
                (ATTENTION, cost.attention),
            )
            if one != Cost()
        }
        usual = usual_steps(alike)
        profiles.append(
            Profile(kind, len(usual), mean_parts(usual), floors, cost.total.seconds(speed))
        )
    return profiles


def usual_steps(steps: Sequence[TimedStep]) -> Sequence[TimedStep]:
    """The middle half by time: without those that something disturbed."""
    ordered = sorted(steps, key=lambda step: step.seconds)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut]


def mean_parts(steps: Sequence[TimedStep]) -> dict[str, float]:
    """Part -> seconds, the longest first."""
    parts = {part for step in steps for part in step.parts}
    means = {part: sum(s.parts.get(part, 0.0) for s in steps) / len(steps) for part in parts}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def show(profile: Profile) -> Table:
    table = Table(title=f"{profile.name} ({profile.steps} steps)")
    for column in ("", "ms", "share", "floor, ms"):
        table.add_column(column, justify="left" if not column else "right")
    for part, seconds in profile.parts.items():
        floor = f"{profile.floors[part] * 1e3:.2f}" if part in profile.floors else ""
        share = f"{seconds / profile.seconds:.0%}"
        table.add_row(part, f"{seconds * 1e3:.2f}", share, floor)
    table.add_section()
    share = f"{profile.floor / profile.seconds:.0%} of floor"
    table.add_row("step", f"{profile.seconds * 1e3:.2f}", share, f"{profile.floor * 1e3:.2f}")
    return table


def main(
    waves: Annotated[int, typer.Option(help="How often each work is done.", min=1)] = 5,
    operators: Annotated[
        bool, typer.Option("--operators", help="Show PyTorch's own profile, too.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")] = RESULT,
) -> None:
    """Times the parts of a step."""
    console, profiles = Console(), []
    engine = ProfiledEngine(RANKS, BATCH * PROMPT_TOKENS)
    speeds, measured = [measure_speed(engine.model)], {}
    for name, work in WORKS.items():
        engine.steps(work)  # brings the adapters into the pool
        measured[name] = [step for _ in range(waves) for step in engine.steps(work)]
        speeds.append(measure_speed(engine.model))
        if operators:
            for step, table in engine.operations(work):
                print(f"{name}: a step of {step.tokens} tokens", table, sep="\n")
    engine.close()
    speed = median_speed(speeds)
    for name, work in WORKS.items():
        profiles += profiles_of(name, work, measured[name], engine.model, speed)
    for profile in profiles:
        console.print(show(profile))
    result = {
        "benchmark": "step_profile",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine() | speed.to_json(),
        "profiles": [profile.to_json() for profile in profiles],
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
