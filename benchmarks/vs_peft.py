"""The same work through PEFT's mixed-batch generation and through the engine, side by side.

    python -m benchmarks.vs_peft

A batch of 16 prompts of 128 random tokens, 64 new tokens each, greedy, bfloat16, on the bare model
and with 1, 8 and 16 distinct adapters of rank 8 to 64 on all linear layers. Rounds alternate
between the two, so that a machine that drifts drifts for both; the ratio is of medians. The
engine's prefix cache is off: repeated prompts would flatter it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from benchmarks.machine import describe_machine
from polydelta.adapters_store.catalog import AdapterCatalog
from polydelta.engine.build import build_engine
from polydelta.engine.config import EngineConfig
from polydelta.engine.engine import Engine
from polydelta.engine.models.checkpoint import default_model
from polydelta.engine.request import GenerationRequest, RequestOutput, SamplingParams

BATCH, PROMPT_TOKENS, NEW_TOKENS = 16, 128, 64
RANKS = (8, 16, 32, 64)
RESULT = Path(__file__).parent / "results" / "vs_peft.json"


@dataclass
class Point:
    """One kind of batch, and the seconds that each round of it took."""

    name: str
    # Distinct adapters in the batch; 0 is the bare model.
    adapters: int
    # The ratio that the engine must reach.
    bar: float
    peft_seconds: list[float] = field(default_factory=list)
    engine_seconds: list[float] = field(default_factory=list)
    # Share of the prompts whose first new token is the same in both.
    first_token_agreement: float = 0.0

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """PEFT's and the engine's, by the median round."""
        tokens = BATCH * NEW_TOKENS
        return (
            tokens / statistics.median(self.peft_seconds),
            tokens / statistics.median(self.engine_seconds),
        )

    @property
    def ratio(self) -> float:
        theirs, ours = self.tokens_per_second
        return ours / theirs

    def names(self, adapters: Sequence[str]) -> list[str | None]:
        """The adapter of each prompt."""
        if not self.adapters:
            return [None] * BATCH
        return [adapters[row % self.adapters] for row in range(BATCH)]


def make_points() -> list[Point]:
    return [
        Point("bare model", 0, 1.5),
        Point("1 adapter", 1, 2.0),
        Point("8 adapters", 8, 1.0),
        Point("16 distinct adapters", 16, 4.0),
    ]


def load_reference() -> PreTrainedModel:
    path = default_model()
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        # Without it transformers multiplies with packed 4-bit weights, slowly.
        quantization_config=GgufConfig(dequantize=True),
    ).eval()


def write_adapters(folder: Path) -> list[str]:
    """Saves random adapters with PEFT: rank 8 to 64, every linear layer, B not zero."""
    names = []
    base = load_reference()
    for number in range(BATCH):
        torch.manual_seed(number)
        rank = RANKS[number % len(RANKS)]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01 / rank**0.5)
        names.append(f"adapter-{number:02d}")
        model.save_pretrained(folder / names[-1])
        base = model.unload()
    return names


def load_peft(folder: Path, names: Sequence[str]) -> PeftModel:
    model = PeftModel.from_pretrained(load_reference(), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return model.eval()


@torch.inference_mode()
def run_peft(model: Any, prompts: torch.Tensor, names: Sequence[str | None]) -> torch.Tensor:
    """`[batch, new tokens]`"""
    mixed = {"adapter_names": [name or "__base__" for name in names]} if any(names) else {}
    tokens = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        **mixed,
    )
    return tokens[:, prompts.shape[1] :]


def run_engine(
    engine: Engine, catalog: AdapterCatalog, prompts: torch.Tensor, names: Sequence[str | None]
) -> torch.Tensor:
    """`[batch, new tokens]`"""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in names]
    left = threading.Semaphore(0)

    def collect(row: int, output: RequestOutput) -> None:
        tokens[row] += output.token_ids
        if output.finished:
            left.release()

    for row, name in enumerate(names):
        adapter = catalog.resolve(name) if name else None
        request = GenerationRequest(f"{row}", prompts[row].tolist(), params, adapter)
        engine.submit(request, lambda output, row=row: collect(row, output))
    for _ in names:
        left.acquire()
    return torch.tensor(tokens)


def measure(points: Sequence[Point], rounds: int, folder: Path) -> None:
    names = write_adapters(folder)
    config = EngineConfig(dtype="bfloat16", prefix_caching=False, max_batch_tokens=2048)
    engine = build_engine(None, config)
    engine.start()
    catalog = AdapterCatalog([folder])
    bare, mixed = load_reference(), load_peft(folder, names)
    prompts = torch.randint(100, 40000, (BATCH, PROMPT_TOKENS))
    with Progress() as progress:
        task = progress.add_task("Measuring", total=len(points) * (rounds + 1))
        for point in points:
            wanted = point.names(names)
            model = mixed if point.adapters else bare
            for number in range(rounds + 1):
                began = time.perf_counter()
                theirs = run_peft(model, prompts, wanted)
                between = time.perf_counter()
                ours = run_engine(engine, catalog, prompts, wanted)
                ended = time.perf_counter()
                if number:  # the first round warms both up
                    point.peft_seconds.append(between - began)
                    point.engine_seconds.append(ended - between)
                progress.advance(task)
            same = (ours[:, 0] == theirs[:, 0]).float().mean()
            point.first_token_agreement = round(float(same), 3)
    engine.shutdown()


def report(points: Sequence[Point], console: Console) -> None:
    table = Table(title="Output tokens a second, batch 16, prompt 128, 64 new tokens, bfloat16")
    for column in ("", "PEFT", "PolyDelta", "ratio", "bar"):
        table.add_column(column, justify="left" if not column else "right")
    for point in points:
        theirs, ours = point.tokens_per_second
        ratio = f"{point.ratio:.2f}x"
        style = "green" if point.ratio >= point.bar else "red"
        bar = f"{point.bar:.1f}x"
        table.add_row(point.name, f"{theirs:.0f}", f"{ours:.0f}", f"[{style}]{ratio}[/]", bar)
    console.print(table)


def main(
    rounds: Annotated[int, typer.Option(help="Counted rounds of each point.")] = 3,
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")] = RESULT,
) -> None:
    """Compares the engine with PEFT's mixed-batch generation."""
    points = make_points()
    with tempfile.TemporaryDirectory() as folder:
        measure(points, rounds, Path(folder))
    report(points, Console())
    result = {
        "benchmark": "vs_peft",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine() | {"peft": peft.__version__},
        "work": {
            "batch": BATCH,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "ranks": RANKS,
            "dtype": "bfloat16",
        },
        "points": [
            asdict(point)
            | {
                "peft_tokens_per_second": round(point.tokens_per_second[0], 1),
                "engine_tokens_per_second": round(point.tokens_per_second[1], 1),
                "ratio": round(point.ratio, 2),
            }
            for point in points
        ],
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
