"""What it costs that a batch mixes many kinds of adapter, beside LoRAs of the same bytes.

Every request has an adapter of its own, but for one of the bare base. The two batches take turns in
one engine; what is compared is the time of a decode step in which all of them take part.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.timed_answer import TimedAnswer
from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.delta import Adapter, LowRank
from polydelta.adapters_store.formats.format_table import FORMAT_ROWS, usual_adapter
from polydelta.adapters_store.load_times import LoadTimes
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packing import pack
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.build import build_engine
from polydelta.engine.config import EngineConfig
from polydelta.engine.engine import Engine
from polydelta.engine.request import GenerationRequest, SamplingParams

RESULT = Path(__file__).parent / "results" / "mixed_kinds.json"
# Of each, one adapter of the usual size; and one request of the bare base.
FORMATS = (
    "LORA",
    "LORA use_dora",
    "VERA",
    "LOHA",
    "MISS",
    "IA3",
    "ROAD",
    "SHIRA",
    "S2FT",
    "BITDELTA",
    "PREFIX_TUNING",
    "LORA alora_invocation_tokens",
)
DTYPE = torch.bfloat16
PROMPT_TOKENS, NEW_TOKENS = 32, 64
AIM = 1.3


@dataclass
class MadeAdapters:
    """Adapters that never were files; see `disk_tier.AdapterLoader`."""

    packed: dict[str, PackedAdapter] = field(default_factory=dict)
    times: LoadTimes = field(default_factory=LoadTimes)

    def load(self, ref: AdapterRef) -> PackedAdapter:
        return self.packed[ref.id]


@dataclass
class Group:
    """Requests that run together."""

    name: str
    # None is the bare base.
    adapters: Sequence[PackedAdapter | None]
    # Of a decode step, in each round.
    seconds: list[float] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self.adapters if adapter is not None)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "requests": len(self.adapters),
            "adapter_bytes": self.nbytes,
            "step_ms": round(self.median * 1e3, 2),
            "rounds_step_ms": [round(one * 1e3, 2) for one in self.seconds],
        }


def mixed_group(layout: BaseLayout) -> Group:
    rows = {name: row for row in FORMAT_ROWS for name in row.formats}
    adapters = [
        pack(usual_adapter(rows[name], layout, seed), layout, DTYPE)
        for seed, name in enumerate(FORMATS)
    ]
    return Group("all kinds", [None, *adapters])


def lora_group(layout: BaseLayout, count: int, nbytes: int) -> Group:
    """LoRAs on all linear layers, all of one rank, that have so many bytes together."""
    one = pack(random_lora(layout, 1, seed=0), layout, DTYPE).nbytes
    rank = max(1, round(nbytes / count / one))
    adapters = [pack(random_lora(layout, rank, seed), layout, DTYPE) for seed in range(count)]
    return Group(f"LoRA r={rank}", [None, *adapters])


def random_lora(layout: BaseLayout, rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(1000 + seed)
    modules = {}
    for name, (out_features, in_features) in layout.module_shapes.items():
        a = torch.randn(rank, in_features, generator=generator) * 0.02
        b = torch.randn(out_features, rank, generator=generator) * 0.01 / rank**0.5
        modules[name] = (LowRank(a, b),)
    return Adapter(f"lora-{seed}", 1, f"lora {rank} {seed}", "LORA", modules)


def run(engine: Engine, made: MadeAdapters, group: Group, random: Random) -> float:
    """Seconds of a decode step of all requests together."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    answers = []
    for number, adapter in enumerate(group.adapters):
        name = f"{group.name}-{number}"
        shares = ()
        invocation: tuple[int, ...] = ()
        if adapter is not None:
            made.packed[name] = adapter
            shares = (Share(AdapterRef(name, 1, Path(name))),)
            invocation = adapter.invocation
        prompt = [random.randrange(100, 40000) for _ in range(PROMPT_TOKENS)]
        prompt[: len(invocation)] = invocation
        answer = TimedAnswer()
        answers.append(answer)
        engine.submit(GenerationRequest(name, prompt, params, shares), answer.take)
    for answer in answers:
        answer.wait()
    # Between the first token of the last and the last of the first, all of them decode.
    began, ended = max(a.times[0] for a in answers), min(a.times[-1] for a in answers)
    steps = sum(began < at <= ended for at in answers[0].times)
    return (ended - began) / steps


def show(mixed: Group, loras: Group) -> Table:
    ratio = mixed.median / loras.median
    table = Table(title=f"A decode step of {len(mixed.adapters)} requests, each its own adapter")
    for column in ("", "adapters, MB", "ms", "to LoRA", "aim"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(loras.name, f"{loras.nbytes / 1e6:.1f}", f"{loras.median * 1e3:.1f}", "", "")
    shown = f"[{'green' if ratio <= AIM else 'red'}]{ratio:.2f}[/]"
    table.add_row(
        mixed.name, f"{mixed.nbytes / 1e6:.1f}", f"{mixed.median * 1e3:.1f}", shown, f"{AIM}"
    )
    return table


def main(
    rounds: Annotated[int, typer.Option(help="Counted rounds of each batch.", min=1)] = 7,
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")] = RESULT,
) -> None:
    """Times a batch of many kinds of adapter beside one of LoRAs."""
    console, made, random = Console(), MadeAdapters(), Random(0)
    config = EngineConfig(
        dtype="bfloat16",
        max_batch_size=len(FORMATS) + 1,
        pool_bytes=2 << 30,
        prefix_caching=False,
    )
    engine = build_engine(None, config, make_loader=lambda *_: made)
    mixed = mixed_group(engine.layout)
    loras = lora_group(engine.layout, len(FORMATS), mixed.nbytes)
    engine.start()
    try:
        with Progress(console=console) as progress:
            for number in progress.track(range(-1, rounds), description="Measuring"):
                for group in (mixed, loras) if number % 2 else (loras, mixed):
                    seconds = run(engine, made, group, random)
                    if number >= 0:  # the first loads all adapters
                        group.seconds.append(seconds)
    finally:
        engine.shutdown()
    console.print(show(mixed, loras))
    result = {
        "benchmark": "mixed_kinds",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "work": {
            "formats": list(FORMATS),
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "dtype": "bfloat16",
        },
        "ratio": round(mixed.median / loras.median, 3),
        "groups": [mixed.to_json(), loras.to_json()],
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
