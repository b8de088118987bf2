"""The same work through PEFT's mixed-batch generation and through the engine, side by side.

    python -m benchmarks.vs_peft

A batch of 16 prompts of 128 random tokens, 64 new tokens each, greedy, bfloat16, on the bare model
and with 1, 8 and 16 distinct adapters of rank 8 to 64 on all linear layers. Each side has a process
of its own and they take turns, so that a machine that drifts drifts for both; the ratio is of
medians. The engine's prefix cache is off: repeated prompts would flatter it.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
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
from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.build import build_engine
from polydelta.engine.config import EngineConfig
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


class PeftSide:
    """PEFT's mixed-batch generation; without adapters the bare transformers model."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.bare = load_reference()
        self.mixed: Any = PeftModel.from_pretrained(
            load_reference(), folder / names[0], adapter_name=names[0]
        )
        for name in names[1:]:
            self.mixed.load_adapter(folder / name, adapter_name=name)
        self.mixed.eval()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], names: Sequence[str | None]) -> list[list[int]]:
        """New tokens of each prompt."""
        model: Any = self.mixed if any(names) else self.bare
        mixed = {"adapter_names": list(names)} if any(names) else {}
        ids = torch.tensor(prompts)
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            **mixed,
        )
        return tokens[:, ids.shape[1] :].tolist()


class EngineSide:
    """The engine, requests submitted all at once."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:  # noqa: ARG002
        config = EngineConfig(dtype="bfloat16", prefix_caching=False, max_batch_tokens=2048)
        self.engine = build_engine(None, config)
        self.engine.start()
        self.catalog = FolderCatalog([folder])

    def run(self, prompts: list[list[int]], names: Sequence[str | None]) -> list[list[int]]:
        """New tokens of each prompt."""
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        tokens: list[list[int]] = [[] for _ in names]
        finished = threading.Semaphore(0)

        def collect(row: int, output: RequestOutput) -> None:
            tokens[row] += output.token_ids
            if output.finished:
                finished.release()

        for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            adapters = (Share(self.catalog.resolve(name)),) if name else ()
            request = GenerationRequest(f"{row}", prompt, params, adapters)
            self.engine.submit(request, partial(collect, row))
        for _ in names:
            finished.acquire()
        return tokens


def serve_side(
    side: Callable[[Path, Sequence[str]], PeftSide | EngineSide],
    folder: Path,
    names: Sequence[str],
    pipe: Connection,
) -> None:
    """A process of its own for each side: two OpenMP teams in one process slow each other down."""
    runner = side(folder, names)
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        began = time.perf_counter()
        tokens = runner.run(*work)
        pipe.send((time.perf_counter() - began, tokens))


class Side:
    """A side's process, seen from here."""

    def __init__(
        self,
        side: Callable[[Path, Sequence[str]], PeftSide | EngineSide],
        folder: Path,
        names: Sequence[str],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve_side, args=(side, folder, names, theirs), daemon=True
        )
        self._process.start()
        self._pipe.recv()

    def run(
        self, prompts: list[list[int]], names: Sequence[str | None]
    ) -> tuple[float, list[list[int]]]:
        """Seconds, and the new tokens of each prompt."""
        self._pipe.send((prompts, names))
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def measure(points: Sequence[Point], rounds: int, folder: Path) -> None:
    names = write_adapters(folder)
    peft_side, engine_side = Side(PeftSide, folder, names), Side(EngineSide, folder, names)
    prompts = torch.randint(100, 40000, (BATCH, PROMPT_TOKENS)).tolist()
    with Progress() as progress:
        task = progress.add_task("Measuring", total=len(points) * (rounds + 1))
        for point in points:
            for number in range(rounds + 1):
                seconds, theirs = peft_side.run(prompts, point.names(names))
                our_seconds, ours = engine_side.run(prompts, point.names(names))
                if number:  # the first round warms both up
                    point.peft_seconds.append(seconds)
                    point.engine_seconds.append(our_seconds)
                progress.advance(task)
            same = [mine[0] == other[0] for mine, other in zip(ours, theirs, strict=True)]
            point.first_token_agreement = sum(same) / len(same)
    peft_side.close()
    engine_side.close()


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
