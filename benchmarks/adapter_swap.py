"""What adapters cost that do not all fit: from disk and host RAM into the pool, and 2,000 of them.

    python -m benchmarks.adapter_swap

Three parts, the default model in bfloat16, each adapter uploaded to an adapter store as a client's
would be. Tiers: time to the first token by where the adapter lies, on an idle engine. Disturbance:
what sequences that are decoding feel of somebody else's load. Many: uniform traffic over 5, 20, 40
and 2,000 adapters of rank 8 with room for 20 in the pool and for 100 in host RAM, the cases taking
turns. `--quick` is a smoke test: its figures mean little.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks import many_adapters, swap_disturbance, swap_tiers
from benchmarks.machine import describe_machine
from benchmarks.many_adapters import Case, make_cases, measure_cases, register
from benchmarks.stored_adapters import StoredAdapters
from benchmarks.swap_disturbance import Disturbance, measure_disturbance
from benchmarks.swap_tiers import MB, RANKS, Bandwidths, Tier, measure_tiers
from benchmarks.timed_answer import Deadline

# Throughput at all adapters to that at 5; time to first token at twice the room to that at fit.
THROUGHPUT_BAR, FIRST_TOKEN_BAR = 0.95, 2.0
RESULT = Path(__file__).parent / "results" / "adapter_swap.json"


@dataclass(frozen=True)
class Plan:
    """How much is measured, and the seconds after which a part stops early."""

    tier_turns: int
    tier_seconds: float
    disturbance_turns: int
    disturbance_seconds: float
    register_seconds: float
    rounds: int
    requests: int
    traffic_seconds: float


FULL = Plan(10, 45.0, 4, 45.0, 180.0, rounds=2, requests=200, traffic_seconds=200.0)
QUICK = Plan(1, 5.0, 1, 5.0, 10.0, rounds=1, requests=4, traffic_seconds=10.0)


def target_ratios(cases: Sequence[Case]) -> dict[str, float]:
    few, fit, twice, every, in_turn = cases
    return {
        "throughput_all_to_5": round(every.tokens_per_second / few.tokens_per_second, 3),
        "throughput_all_to_20": round(every.tokens_per_second / fit.tokens_per_second, 3),
        "throughput_all_to_20_in_turn": round(
            every.tokens_per_second / in_turn.tokens_per_second, 3
        ),
        "first_token_40_to_20_p50": round(twice.first_token(50) / fit.first_token(50), 2),
        "first_token_40_to_20_p99": round(twice.first_token(99) / fit.first_token(99), 2),
        "first_token_all_to_20_p50": round(every.first_token(50) / fit.first_token(50), 2),
    }


def show_tiers(tiers: Sequence[Tier], bandwidths: Bandwidths) -> Table:
    title = (
        f"Time to first token, prompt {swap_tiers.PROMPT_TOKENS}, idle engine "
        f"(copy {bandwidths.copy / 1e9:.1f} GB/s, disk {bandwidths.disk / 1e9:.1f} GB/s)"
    )
    table = Table(title=title)
    for column in ("rank", "the adapter is", "MB", "ms", "extra, ms", "floor, ms"):
        table.add_column(column, justify="left" if "adapter" in column else "right")
    for tier in tiers:
        values = tier.to_json()
        table.add_row(
            str(tier.rank),
            tier.name,
            f"{tier.nbytes / MB:.1f}",
            f"{values['first_token_ms']:.1f}",
            f"{values['extra_ms']:.1f}",
            f"{values['floor_ms']:.1f}",
        )
    return table


def show_disturbance(disturbance: Disturbance) -> Table:
    values = disturbance.to_json()
    title = (
        f"{swap_disturbance.SEQUENCES} base sequences decode, one rank-{swap_disturbance.RANK} "
        "adapter is loaded from disk"
    )
    table = Table(title=title)
    table.add_column("gap between tokens")
    table.add_column("ms", justify="right")
    table.add_column("to before", justify="right")
    rows = {
        "before: median": "before_median_ms",
        "before: largest": "before_largest_ms",
        "while it loads: median": "loading_median_ms",
        "while it loads: largest of a load (median)": "loading_largest_typical_ms",
        "while it loads: largest of all": "loading_largest_ms",
        "its prompt's step, adapter was loaded": "entry_ms",
        "its prompt's step, adapter was in the pool": "entry_resident_ms",
        "had the loop loaded it": "loaded_in_the_loop_ms",
    }
    for label, key in rows.items():
        ratio = values[key] / values["before_median_ms"]
        table.add_row(label, f"{values[key]:.1f}", f"{ratio:.2f}x")
    return table


def show_cases(cases: Sequence[Case]) -> Table:
    few, fit = cases[0], cases[1]
    title = (
        f"{many_adapters.IN_FLIGHT} in flight, prompt {many_adapters.PROMPT_TOKENS}, "
        f"{many_adapters.NEW_TOKENS} new tokens, room for {many_adapters.ROOM} adapters"
    )
    table = Table(title=title)
    columns = ("tok/s", "to 5", "to 20", "TTFT, ms", "to 20", "p99", "loads", "evicted")
    table.add_column("adapters", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for case in cases:
        values = case.to_json()
        table.add_row(
            case.name,
            f"{case.tokens_per_second:.0f}",
            f"{case.tokens_per_second / few.tokens_per_second:.2f}",
            f"{case.tokens_per_second / fit.tokens_per_second:.2f}",
            f"{values['first_token_p50_ms']:.0f}",
            f"{case.first_token(50) / fit.first_token(50):.2f}x",
            f"{values['first_token_p99_ms']:.0f}",
            str(values["loads"]),
            str(values["evictions"]),
        )
    return table


def show_targets(ratios: dict[str, float], adapters: int) -> Table:
    table = Table(title="Targets")
    for column in ("", "ratio", "bar"):
        table.add_column(column, justify="left" if not column else "right")
    throughput, first_token = ratios["throughput_all_to_5"], ratios["first_token_40_to_20_p50"]
    style = "green" if throughput >= THROUGHPUT_BAR else "red"
    label = f"tokens/s, {adapters:,} adapters to 5"
    table.add_row(label, f"[{style}]{throughput:.2f}[/]", f">= {THROUGHPUT_BAR}")
    style = "green" if first_token <= FIRST_TOKEN_BAR else "red"
    label = "time to first token (p50), twice the room to all fit"
    table.add_row(label, f"[{style}]{first_token:.2f}x[/]", f"<= {FIRST_TOKEN_BAR:.0f}x")
    return table


def measure(plan: Plan, adapters: int, folder: Path, console: Console) -> dict[str, Any]:
    """The result's figures, shown as they come."""
    stored = StoredAdapters(folder)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def part(name: str, total: int) -> Any:
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        advance = part("Tiers", (plan.tier_turns + 1) * len(RANKS))
        bandwidths, tiers = measure_tiers(
            stored, plan.tier_turns, Deadline(plan.tier_seconds), advance
        )
        console.print(show_tiers(tiers, bandwidths))

        advance = part("Disturbance", plan.disturbance_turns + 1)
        disturbance = measure_disturbance(
            stored, plan.disturbance_turns, Deadline(plan.disturbance_seconds), advance
        )
        console.print(show_disturbance(disturbance))

        began = time.monotonic()
        advance = part("Registering adapters", adapters)
        refs = register(stored, adapters, Deadline(plan.register_seconds), advance)
        seconds = time.monotonic() - began
        if len(refs) < adapters:
            console.print(f"Only {len(refs)} of {adapters} adapters were registered in time.")

        cases = make_cases(len(refs))
        advance = part("Traffic", plan.rounds * len(cases))
        deadline = Deadline(plan.traffic_seconds)
        measure_cases(stored, refs, cases, plan.rounds, plan.requests, deadline, advance)
    stored.close()
    ratios = target_ratios(cases)
    console.print(show_cases(cases))
    console.print(show_targets(ratios, len(refs)))
    return {
        "bandwidths_gb_per_second": {
            "copy": round(bandwidths.copy / 1e9, 2),
            "disk": round(bandwidths.disk / 1e9, 2),
        },
        "tiers": [tier.to_json() for tier in tiers],
        "disturbance": disturbance.to_json(),
        "registered": {"adapters": len(refs), "seconds": round(seconds, 1)},
        "cases": [case.to_json() for case in cases],
        "ratios": ratios,
    }


def main(
    adapters: Annotated[int, typer.Option(help="Registered in the third part.", min=40)] = 2000,
    quick: Annotated[bool, typer.Option(help="A smoke test of some 20 s.")] = False,
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")] = RESULT,
) -> None:
    """Measures what it costs that adapters do not all fit into the pool."""
    plan, adapters = (QUICK, min(adapters, 60)) if quick else (FULL, adapters)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(plan, adapters, Path(folder), Console())
    result = {
        "benchmark": "adapter_swap",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "work": {
            "quick": quick,
            "dtype": "bfloat16",
            "tiers": {"prompt_tokens": swap_tiers.PROMPT_TOKENS, "ranks": RANKS},
            "disturbance": {
                "sequences": swap_disturbance.SEQUENCES,
                "prompt_tokens": swap_disturbance.PROMPT_TOKENS,
                "rank": swap_disturbance.RANK,
            },
            "many": {
                "rank": many_adapters.RANK,
                "modules": many_adapters.ATTENTION,
                "in_flight": many_adapters.IN_FLIGHT,
                "prompt_tokens": many_adapters.PROMPT_TOKENS,
                "new_tokens": many_adapters.NEW_TOKENS,
                "room_in_pool": many_adapters.ROOM,
                "room_in_host_ram": many_adapters.HOST_ROOM,
                "rounds": plan.rounds,
                "requests_a_round": plan.requests,
            },
        },
        **figures,
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
