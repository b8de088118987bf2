"""What quantised weights cost in perplexity, and what they bring in speed.

    python -m benchmarks.perplexity

The default model reads Python's own documentation (`pydoc_data.topics`, which comes with Python
under the PSF licence) in windows of 512 tokens that overlap by half; the second half of each
counts. Its GGUF file has 4 bits already, and 8 for the head: `--quantization int4` keeps them, and
so costs nothing ("kept"). "Rounded" is what a model without codes of its own gets, here with the
same weights: those of 4 bits are found again, unless groups of columns are moved by half of their
width, so that each has numbers of two in the file. That is a model whose weights are on no grid.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.floor import linear_size
from benchmarks.machine import describe_machine
from benchmarks.timed_answer import Client
from polydelta.engine.build import assemble, weight_bits
from polydelta.engine.config import EngineConfig
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.checkpoint import Checkpoint, open_checkpoint
from polydelta.engine.models.decoder import HEAD_BITS, Decoder
from polydelta.engine.models.weights import TensorSource, Weights
from polydelta.engine.paged_kv import PagedKV
from polydelta.kernels.ops import Kernels, SequenceSlice, kernels_for
from polydelta.kernels.quantized_weight import GROUP, quantize, stored_bits

RESULT = Path(__file__).parent / "results" / "perplexity.json"
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
# Tokens; of each window the second half counts.
WINDOW, COUNTED = 512, 256
BLOCK_SIZE = 16
PROMPT_TOKENS, NEW_TOKENS, BATCH = 128, 64, 16


@dataclass(frozen=True)
class Way:
    """How weights are kept."""

    name: str
    quantization: str | None
    # The codes in the model's file.
    own_codes: bool = False
    # The weights rounded with groups that are moved, and then kept in bfloat16: for perplexity.
    moved_bits: int | None = None


WAYS = (
    Way("bfloat16", None),
    Way("int8, rounded", "int8"),
    Way("int4, rounded", "int4"),
    Way("int4, kept", "int4", own_codes=True),
    Way("8 bits, moved groups", None, moved_bits=8),
    Way("4 bits, moved groups", None, moved_bits=4),
)


@dataclass(frozen=True)
class Outcome:
    perplexity: float
    # What a decode step reads: linear layers and head.
    weight_bytes: int
    # Output tokens a second of all requests together, the prompts' time included; none where
    # nothing but perplexity is meant.
    single_stream: float | None = None
    batch: float | None = None


class PlainTensors:
    """A checkpoint's tensors without codes; rounded with moved groups if `moved_bits`."""

    def __init__(self, source: TensorSource, moved_bits: int | None) -> None:
        self._source = source
        self._moved_bits = moved_bits

    def names(self) -> Collection[str]:
        return self._source.names()

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name).to(DTYPE)
        if self._moved_bits is None or tensor.dim() < 2 or "embed" in name:
            return tensor
        moved = quantize(tensor.roll(GROUP // 2, 1), self._moved_bits).dequantized()
        return moved.roll(-GROUP // 2, 1).to(DTYPE)


def measure(way: Way, tokens: int, rounds: int) -> Outcome:
    """In a process of its own: two sets of kernels would be in each other's way."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(_measure, way, tokens, rounds).result()


def _measure(way: Way, tokens: int, rounds: int) -> Outcome:
    checkpoint = open_checkpoint(None)
    if not way.own_codes:
        checkpoint = replace(checkpoint, tensors=PlainTensors(checkpoint.tensors, way.moved_bits))
    # One for both: perplexity leaves torch with one thread, and kernels have as many as torch.
    kernels = kernels_for(CPU, DTYPE)
    speeds = _speeds(checkpoint, way, kernels, rounds) if way.moved_bits is None else ()
    perplexity = _perplexity(checkpoint, way, kernels, tokens)
    return Outcome(perplexity, _weight_bytes(checkpoint, way), *speeds)


@torch.inference_mode()
def _perplexity(checkpoint: Checkpoint, way: Way, kernels: Kernels, tokens: int) -> float:
    text = "\n\n".join(topics.values())
    ids = torch.tensor(checkpoint.tokenizer.encode(text)[:tokens])
    model = checkpoint.config
    kernels.enter_thread()
    weights = Weights(checkpoint.tensors, DTYPE, lambda *_: None, weight_bits(way.quantization))
    decoder = Decoder(model, weights, kernels, WINDOW, DTYPE)
    pages = range(WINDOW // BLOCK_SIZE)
    spec = KVSpec.of(model, DTYPE, BLOCK_SIZE)
    storage = torch.zeros(model.num_layers, len(pages), spec.page_bytes, dtype=torch.uint8)
    cache = PagedKV(storage, spec, kernels)
    positions = torch.arange(WINDOW)
    total, count = 0.0, 0
    for start in range(0, len(ids) - WINDOW + 1, COUNTED):
        window = ids[start : start + WINDOW]
        cache.prepare(positions, [SequenceSlice(0, WINDOW, WINDOW, pages)])
        hidden = decoder.hidden_states(window, positions, cache)
        logits = decoder.logits(hidden[WINDOW - COUNTED - 1 : -1])
        total += float(cross_entropy(logits, window[-COUNTED:], reduction="sum"))
        count += COUNTED
    return math.exp(total / count)


def _speeds(checkpoint: Checkpoint, way: Way, kernels: Kernels, rounds: int) -> tuple[float, float]:
    """The best of the rounds: single stream, and BATCH requests at a time."""
    config = EngineConfig(
        quantization=way.quantization, prefix_caching=False, max_batch_tokens=2048
    )
    # On a thread that ends, for the reason given in engine/build.py.
    with ThreadPoolExecutor(max_workers=1) as loading:
        engine = loading.submit(assemble, checkpoint, config, kernels).result()
    engine.start()
    client = Client(engine, PROMPT_TOKENS)

    def tokens_per_second(requests: int) -> float:
        answers = [client.ask(NEW_TOKENS) for _ in range(requests)]
        ended = max(answer.wait().times[-1] for answer in answers)
        return requests * NEW_TOKENS / (ended - answers[0].began)

    try:
        speeds = [(tokens_per_second(1), tokens_per_second(BATCH)) for _ in range(rounds + 1)]
    finally:
        engine.shutdown()
    single, batch = zip(*speeds[1:], strict=True)
    return max(single), max(batch)


def _weight_bytes(checkpoint: Checkpoint, way: Way) -> int:
    model, bits = checkpoint.config, weight_bits(way.quantization)
    linear, head = linear_size(model) * model.num_layers, model.vocab_size * model.hidden_size
    if bits is None:
        return (linear + head) * DTYPE.itemsize
    return int(linear * stored_bits(bits) + head * stored_bits(HEAD_BITS)) // 8


def _rounded(speed: float | None) -> str:
    return "" if speed is None else f"{speed:.0f}"


def _show(outcomes: dict[str, Outcome]) -> Table:
    base = outcomes[WAYS[0].name]
    table = Table(title="Quantised weights, default model")
    table.add_column("")
    for column in ("perplexity", "cost", "MB", "tokens/s, 1 stream", f"tokens/s, {BATCH}"):
        table.add_column(column, justify="right")
    for name, each in outcomes.items():
        table.add_row(
            name,
            f"{each.perplexity:.4f}",
            f"{each.perplexity / base.perplexity - 1:+.2%}",
            f"{each.weight_bytes / 1e6:.0f}",
            _rounded(each.single_stream),
            _rounded(each.batch),
        )
    return table


def main(
    tokens: Annotated[int, typer.Option(help="Of the text that are read.", min=WINDOW)] = 24576,
    rounds: Annotated[int, typer.Option(help="Counted rounds of the speeds.", min=1)] = 3,
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")] = RESULT,
) -> None:
    """Perplexity, bytes and speed of each way to keep the default model's weights."""
    console = Console()
    console.print(f"Text: the first {tokens} tokens of pydoc_data.topics (Python, PSF licence)")
    outcomes = {way.name: measure(way, tokens, rounds) for way in WAYS}
    console.print(_show(outcomes))
    result = {
        "machine": describe_machine(),
        "text": "pydoc_data.topics (Python, PSF licence)",
        "tokens": tokens,
        "window": WINDOW,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "batch": BATCH,
        "ways": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
