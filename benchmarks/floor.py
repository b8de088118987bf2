"""The least time that work can take on a machine: what must be read at the speed of its memory,
what must be multiplied at the speed of its cores, in each step whichever takes longer.

    python -m benchmarks.floor

A step reads every weight once, however many rows it has, every adapter that a row wants once, and
the keys and values of every sequence. Norms, rotations and additions count for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine_speed import MachineSpeed, measure_speed
from polydelta.engine.models.checkpoint import open_checkpoint
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.layers import fused_linears

# Bytes of a bfloat16: adapters, keys and values.
ITEM_BYTES = 2


@dataclass(frozen=True)
class Cost:
    """What must be read and computed."""

    nbytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.nbytes + other.nbytes, self.flops + other.flops)

    def seconds(self, speed: MachineSpeed) -> float:
        return max(self.nbytes / speed.memory, self.flops / speed.matmul)


@dataclass(frozen=True)
class Work:
    """Sequences that start together, each with a prompt and an output of the same lengths."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    # Of the distinct adapters, LoRAs on all linear layers; sequences take them in turn.
    ranks: Sequence[int] = ()
    # Bits of one weight of a linear layer and of the head, scales included.
    weight_bits: float = 16.0
    head_bits: float = 16.0

    @property
    def tokens(self) -> int:
        """All that come out."""
        return self.batch * self.new_tokens

    @property
    def used_ranks(self) -> Sequence[int]:
        """Those of adapters that some sequence has."""
        return self.ranks[: self.batch]

    @property
    def rank_of_rows(self) -> int:
        """The sum of the sequences' ranks."""
        return sum(self.ranks[row % len(self.ranks)] for row in range(self.batch) if self.ranks)


@dataclass(frozen=True)
class StepCost:
    """One step's, by what it is spent on."""

    linears: Cost = field(default_factory=Cost)
    head: Cost = field(default_factory=Cost)
    adapters: Cost = field(default_factory=Cost)
    attention: Cost = field(default_factory=Cost)

    @property
    def total(self) -> Cost:
        return self.linears + self.head + self.adapters + self.attention


@dataclass(frozen=True)
class Floor:
    """Seconds of the whole work at best."""

    work: Work
    prefill: float
    # All decode steps together.
    decode: float

    @property
    def tokens_per_second(self) -> float:
        return self.work.tokens / (self.prefill + self.decode)


def step_cost(model: ModelConfig, work: Work, tokens: int, context: int) -> StepCost:
    """Of a step in which each sequence computes `tokens` tokens, and has `context` with them; the
    head sees the last token of each."""
    rows, layers = work.batch * tokens, model.num_layers
    linear, head = linear_size(model) * layers, model.vocab_size * model.hidden_size
    per_rank = size_per_rank(model) * layers
    windows = model.sliding_windows or (None,) * layers
    seen = sum(tokens_seen(tokens, context, window) for window in windows)
    pairs = sum(query_key_pairs(tokens, context, window) for window in windows)
    return StepCost(
        Cost(linear * work.weight_bits / 8, 2 * rows * linear),
        Cost(head * work.head_bits / 8, 2 * work.batch * head),
        Cost(
            sum(work.used_ranks) * per_rank * ITEM_BYTES,
            2 * tokens * work.rank_of_rows * per_rank,
        ),
        Cost(
            work.batch * seen * 2 * model.kv_size * ITEM_BYTES,
            # A product with the key, and one with the value.
            work.batch * pairs * 4 * model.q_size,
        ),
    )


def floor_of(model: ModelConfig, work: Work, speed: MachineSpeed) -> Floor:
    """The prefill in one step; its last row gives the first new token."""
    prompt = work.prompt_tokens
    prefill = step_cost(model, work, prompt, prompt).total.seconds(speed)
    decode = sum(
        step_cost(model, work, 1, prompt + step).total.seconds(speed)
        for step in range(1, work.new_tokens)
    )
    return Floor(work, prefill, decode)


def linear_size(model: ModelConfig) -> int:
    """Weights of the linear layers of one block."""
    return sum(
        fused.in_features * part.out_features
        for fused in fused_linears(model)
        for part in fused.parts
    )


def size_per_rank(model: ModelConfig) -> int:
    """Elements that one rank of a LoRA takes in a block: a row of A and a column of B each."""
    return sum(
        fused.in_features + part.out_features
        for fused in fused_linears(model)
        for part in fused.parts
    )


def tokens_seen(tokens: int, context: int, window: int | None) -> int:
    """Tokens whose keys are read for the last `tokens` of `context`."""
    return context if window is None else min(context, window + tokens - 1)


def query_key_pairs(tokens: int, context: int, window: int | None) -> int:
    """Under causality: the query at place p, from 1, sees p tokens, or the window."""
    places = range(context - tokens + 1, context + 1)
    return sum(place if window is None else min(place, window) for place in places)


def main() -> None:
    """Prints the floor of the usual work with the default model on this machine."""
    model = open_checkpoint(None).config
    speed = measure_speed(model)
    ranks = (8, 16, 32, 64) * 4
    works = {
        "base only": Work(16, 128, 64),
        "1 adapter": Work(16, 128, 64, ranks[:1]),
        "8 adapters": Work(16, 128, 64, ranks[:8]),
        "16 distinct adapters": Work(16, 128, 64, ranks),
        "single stream, base": Work(1, 128, 64),
        "single stream, 1 adapter": Work(1, 128, 64, ranks[:1]),
    }
    table = Table(
        title=f"Floor: reads {speed.read / 1e9:.0f} GB/s, copies {speed.copy / 1e9:.0f} GB/s, "
        f"multiplies {speed.matmul / 1e9:.0f} GFLOP/s"
    )
    for column in ("", "prefill ms", "decode ms a step", "tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, work in works.items():
        floor = floor_of(model, work, speed)
        step = floor.decode / (work.new_tokens - 1)
        table.add_row(
            name,
            f"{floor.prefill * 1e3:.0f}",
            f"{step * 1e3:.2f}",
            f"{floor.tokens_per_second:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
