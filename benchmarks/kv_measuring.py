"""What a way to store and read KV changes in what a model says, against native full attention."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.kv_reader import Model, Reader, Way
from benchmarks.kv_retrieval import Haystack, Scores, no_scores, search
from benchmarks.kv_ways import key, read_share
from polydelta.kernels.kv_selection import H2O, parse_selection

# Of the counted positions, one in so many is compared with the whole distribution.
COMPARED = 16
# Of the windows, what is computed token by token reads one in so many.
SEQUENTIAL = 6
# By the name without numbers: what the perplexity may cost.
BARS = {"int8": 0.005, "fp8": 0.005, "int4": 0.03, "mustafar-50": 0.03, "quest": 0.02}


@dataclass(frozen=True)
class Work:
    """What a model reads."""

    # Each read by itself; its first half is the prompt, the rest counts.
    windows: Sequence[Sequence[int]]
    haystacks: Sequence[Haystack]
    # Native tokens of a page; None for what suits each format.
    block_size: int | None = None

    @property
    def prompt(self) -> int:
        return len(self.windows[0]) // 2

    def windows_for(self, way: Way) -> Sequence[Sequence[int]]:
        """h2o evicts behind each token, so its answers take a step for each."""
        sequential = isinstance(parse_selection(way.selection), H2O)
        return self.windows[: max(1, len(self.windows) // SEQUENTIAL) if sequential else None]

    def tokens(self, way: Way) -> int:
        """That are read in all."""
        haystacks = sum(len(haystack.tokens) for haystack in self.haystacks)
        return haystacks + sum(map(len, self.windows_for(way)))


# What native full attention says at the compared positions of each window, [positions, vocab]
# float32.
Truth = list[Tensor]


@dataclass
class Outcome:
    """Of one way and one model."""

    way: Way
    # Tokens of a page, bytes of a token in the pool with all layers, and bytes that tokens of an
    # answer read on average, of what they read of native KV.
    page_tokens: int
    token_bytes: float
    read_share: float
    # For each window: mean loss of the counted tokens, in nats, and how many they are.
    losses: list[float] = field(default_factory=list)
    counted: int = 0
    # Sums over the compared positions.
    divergence: float = 0.0
    same: int = 0
    compared: int = 0
    scores: Scores = field(default_factory=no_scores)
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.losses))

    def cost(self, native: Outcome) -> tuple[float, float | None]:
        """Perplexity over that of native full attention on the same windows, less 1, and its
        standard error from one window to the next; None for a single window."""
        each = [a - b for a, b in zip(self.losses, native.losses, strict=False)]
        ratio = math.exp(statistics.fmean(each))
        error = None
        if len(each) > 1:
            error = ratio * statistics.stdev(each) / math.sqrt(len(each))
        return ratio - 1, error

    @property
    def bar(self) -> float | None:
        return BARS.get(key(self.way))

    def met(self, native: Outcome) -> bool | None:
        """None where there is no bar."""
        return None if self.bar is None else self.cost(native)[0] <= self.bar

    def to_json(self, native: Outcome) -> dict[str, Any]:
        cost, error = self.cost(native)
        return {
            "way": self.way.name,
            "format": self.way.format,
            "selection": self.way.selection,
            "prefill": self.way.prefill,
            "page_tokens": self.page_tokens,
            "token_bytes": round(self.token_bytes, 1),
            "read_share": round(self.read_share, 4),
            "windows": len(self.losses),
            "counted_tokens": self.counted,
            "perplexity": round(self.perplexity, 5),
            "cost": round(cost, 6),
            "cost_standard_error": None if error is None else round(error, 6),
            "bar": self.bar,
            "met": self.met(native),
            "compared_positions": self.compared,
            "kl_divergence": round(self.divergence / self.compared, 6),
            "same_argmax": round(self.same / self.compared, 5),
            "window_losses": [round(loss, 6) for loss in self.losses],
            "retrieval": [
                {"task": task, "tokens": length, **vars(score)}
                for (task, length), score in self.scores.items()
            ],
            "seconds": round(self.seconds, 1),
        }


def measure(
    model: Model,
    way: Way,
    labels: Tensor,
    work: Work,
    truth: Truth,
    advance: Callable[[int], None],
) -> Outcome:
    """labels: for double-sparsity. truth: empty for native full attention,
    which comes first and fills it. advance: given tokens that were read."""
    began = time.perf_counter()
    selection = parse_selection(way.selection)
    reader = Reader(model, way, labels, work.block_size)
    spec, windows = reader.spec, work.windows_for(way)
    contexts = range(work.prompt, len(work.windows[0]))
    outcome = Outcome(
        way,
        spec.block_size,
        spec.token_bytes,
        read_share(spec, selection, work.prompt, contexts),
    )
    for number, window in enumerate(windows):
        _read_window(reader, window, work.prompt, outcome, truth, number)
        advance(len(window))
    for haystack in work.haystacks:
        outcome.scores[haystack.task, haystack.length] += search(reader, haystack)
        advance(len(haystack.tokens))
    outcome.seconds = time.perf_counter() - began
    return outcome


def _read_window(
    reader: Reader,
    window: Sequence[int],
    prompt: int,
    outcome: Outcome,
    truth: Truth,
    number: int,
) -> None:
    targets = torch.tensor(window)
    losses, compared = [], []

    def take(place: int, logits: Tensor) -> None:
        log_probs = logits.log_softmax(-1)
        wanted = targets[place + 1 : place + 1 + len(logits), None]
        losses.append(-log_probs.gather(1, wanted)[:, 0])
        # The places of the whole window that are compared.
        first = (prompt - 1 - place) % COMPARED
        compared.append(log_probs[first::COMPARED].clone())

    reader.read(window, prompt, take)
    loss = torch.cat(losses)
    outcome.losses.append(float(loss.mean(dtype=torch.float64)))
    outcome.counted += len(loss)
    ours = torch.cat(compared)
    if number == len(truth):
        truth.append(ours)
    native = truth[number]
    outcome.divergence += float((native.exp() * (native - ours)).sum(dtype=torch.float64))
    outcome.same += int((native.argmax(-1) == ours.argmax(-1)).sum())
    outcome.compared += len(ours)
