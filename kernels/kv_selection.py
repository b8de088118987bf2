"""Which tokens of the KV cache a query reads: the choices, and how they are written.

    full  window:4+512  quest:1024  double-sparsity:128  infllm:128+4096  snapkv:2048  h2o:0.1+0.1

Numbers are tokens, or for h2o shares of the prompt; without them they are the authors' defaults.
What prompts read while they are computed is written likewise: full  xattention:8+0.9
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Full:
    """All that came before."""

    name: ClassVar[str] = "full"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Window:
    """The first tokens and the newest ones (StreamingLLM, arXiv:2309.17453, with the positions that
    tokens have). For every query, those of prompts too."""

    name: ClassVar[str] = "window"
    sinks: int = 4
    # The query's own token included.
    recent: int = 512

    def __str__(self) -> str:
        return f"{self.name}:{self.sinks}+{self.recent}"


@dataclass(frozen=True)
class Quest:
    """For each kv head the pages whose keys may score highest, by the least and the most of each
    channel (arXiv:2406.10774), and always the first page and the query's own. For answers only.

    The authors' score takes of each channel the bound that gives most. No key has all of them at
    once: here it is half the way from the middle to there, by which the right pages are found more
    often (perplexity of the default model over the first 4,096 tokens of a text: 1.5 % up, not
    2.2 %).
    """

    name: ClassVar[str] = "quest"
    # Tokens; the pages that hold as many, at least three.
    budget: int = 1024
    # First layers in which everything is read.
    dense_layers: ClassVar[int] = 2
    # Of the way from the middle of a channel's bounds to the one that gives most.
    reach: ClassVar[float] = 0.5
    # Of native KV in a page, where an operator sets none. The fewer tokens, the closer the bounds:
    # over a longer text the perplexity is 1.0 % up, with the 16 of the paper 3.7 %.
    native_tokens: ClassVar[int] = 8

    def num_pages(self, block_size: int) -> int:
        """That are read: the first one, the query's own, and at least one that is chosen."""
        return max(3, -(-self.budget // block_size))

    def __str__(self) -> str:
        return f"{self.name}:{self.budget}"


@dataclass(frozen=True)
class DoubleSparsity:
    """For each kv head the tokens that score highest by a few channels of their keys, those that
    calibration found to matter (arXiv:2408.07092), and always the query's own. For answers only."""

    name: ClassVar[str] = "double-sparsity"
    budget: int = 128
    # Of the head's channels, one in so many is a label.
    label_share: ClassVar[int] = 4

    def __str__(self) -> str:
        return f"{self.name}:{self.budget}"


@dataclass(frozen=True)
class InfLLM:
    """The first tokens, the newest ones, and the blocks between them whose representative tokens
    score highest (arXiv:2402.04617). These blocks lie in host RAM. For answers only."""

    name: ClassVar[str] = "infllm"
    sinks: int = 128
    recent: int = 4096
    # Blocks are pages, as many as hold this number of tokens.
    budget: int = 2048
    # Representatives of a page.
    representatives: ClassVar[int] = 4

    def blocks(self, context: int, block_size: int) -> range:
        """Pages between the first tokens and the newest, with none of either."""
        return range(-(-self.sinks // block_size), (context - self.recent) // block_size)

    def num_chosen(self, block_size: int) -> int:
        """Of these pages."""
        return -(-self.budget // block_size)

    def __str__(self) -> str:
        return f"{self.name}:{self.sinks}+{self.recent}+{self.budget}"


@dataclass(frozen=True)
class SnapKV:
    """When a prompt is done, each kv head keeps the tokens that the prompt's last queries attend to
    most (arXiv:2404.14469), and those queries' own. What is evicted is merged into the most similar
    token that stays (EMS, arXiv:2412.08521)."""

    name: ClassVar[str] = "snapkv"
    # Tokens that stay of a prompt, the window included.
    capacity: int = 2048
    # Last queries of the prompt, which vote.
    window: ClassVar[int] = 32
    # Neighbours whose votes are averaged.
    kernel: ClassVar[int] = 5

    def kept(self, prompt: int) -> int:
        """Tokens that stay of a prompt of so many."""
        return min(prompt, self.capacity)

    def __str__(self) -> str:
        return f"{self.name}:{self.capacity}"


@dataclass(frozen=True)
class H2O:
    """Each kv head keeps the tokens that have received most attention so far, and the newest ones
    (arXiv:2306.14048); evicted tokens are merged as in `SnapKV`."""

    name: ClassVar[str] = "h2o"
    # Shares of the prompt's length.
    heavy: float = 0.1
    recent: float = 0.1

    def kept(self, prompt: int) -> int:
        """Tokens that stay of a prompt of so many."""
        return min(prompt, max(1, int(self.heavy * prompt)) + self.num_recent(prompt))

    def num_recent(self, prompt: int) -> int:
        """Of these, the newest, whatever attention they receive."""
        return max(1, int(self.recent * prompt))

    def __str__(self) -> str:
        return f"{self.name}:{self.heavy:g}+{self.recent:g}"


@dataclass(frozen=True)
class XAttention:
    """For each block of a prompt's queries the blocks of keys that receive most attention, by sums
    over antidiagonals (arXiv:2503.16428), and always the first block and the queries' own. Blocks
    are cut by position. For prompts only, as `--prefill` has it."""

    name: ClassVar[str] = "xattention"
    # Of so many queries, and keys, one diagonal is looked at.
    stride: int = 8
    # Share of the attention that the chosen blocks receive together, at least.
    threshold: float = 0.9
    # Tokens of a block, of queries and of keys.
    block: ClassVar[int] = 128

    def __str__(self) -> str:
        return f"{self.name}:{self.stride}+{self.threshold:g}"


Selection = Full | Window | Quest | DoubleSparsity | InfLLM | SnapKV | H2O | XAttention

FULL = Full()

# What chooses anew for each token of an answer; prompts are read in full.
BY_QUERY = (Quest, DoubleSparsity, InfLLM)
# What drops tokens for good, and so needs pages that nobody shares.
EVICTING = (SnapKV, H2O)


@dataclass(frozen=True)
class _Way:
    make: Callable[..., Selection]
    # What the numbers are called, and what they are; they are joined by "+".
    numbers: Mapping[str, type[int] | type[float]] = field(default_factory=dict)


_WAYS = {
    "full": _Way(Full),
    "window": _Way(Window, {"SINKS": int, "RECENT": int}),
    "quest": _Way(Quest, {"TOKENS": int}),
    "double-sparsity": _Way(DoubleSparsity, {"TOKENS": int}),
    "infllm": _Way(InfLLM, {"SINKS": int, "RECENT": int, "TOKENS": int}),
    "snapkv": _Way(SnapKV, {"TOKENS": int}),
    "h2o": _Way(H2O, {"HEAVY": float, "RECENT": float}),
}
_PREFILLS = {
    "full": _Way(Full),
    "xattention": _Way(XAttention, {"STRIDE": int, "THRESHOLD": float}),
}

SELECTIONS = tuple(_WAYS)
PREFILLS = tuple(_PREFILLS)


def usage(name: str) -> str:
    """How a selection or a prefill is written, such as "window[:SINKS+RECENT]"."""
    numbers = "+".join((_WAYS | _PREFILLS)[name].numbers)
    return f"{name}[:{numbers}]" if numbers else name


def parse_selection(text: str) -> Selection:
    """Raises ValueError for one that there is not, saying what there is."""
    return _parsed(text, _WAYS, "KV selection")


def parse_prefill(text: str) -> Selection:
    """What prompts read while they are computed: Full or XAttention. Raises ValueError likewise."""
    return _parsed(text, _PREFILLS, "prefill")


# Kernels count in 32 bits, and add some of these numbers.
MOST_TOKENS = 1 << 30


def _parsed(text: str, ways: Mapping[str, _Way], what: str) -> Selection:
    name, colon, rest = text.partition(":")
    way = ways.get(name)
    if way is None:
        raise ValueError(f"{what} {text!r} is not known: use one of {', '.join(map(usage, ways))}.")
    parts = rest.split("+") if colon else []
    try:
        if colon and len(parts) != len(way.numbers):
            raise ValueError(text)
        numbers = [_number(*both) for both in zip(parts, way.numbers.values(), strict=False)]
    except ValueError:
        example = f", such as {way.make()}" if way.numbers else ""
        raise ValueError(f"{what} {text!r} cannot be read: write {usage(name)}{example}.") from None
    if max(numbers, default=0) > MOST_TOKENS:
        raise ValueError(f"{what} {text!r} cannot be used: no number is above {MOST_TOKENS}.")
    selection = way.make(*numbers)
    if problem := _problem(selection):
        raise ValueError(f"{what} {text!r} cannot be used: {problem}.")
    return selection


def _number(text: str, kind: type[int] | type[float]) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?" if kind is float else r"[0-9]+", text):
        raise ValueError(text)
    return kind(text)


def _problem(selection: Selection) -> str | None:
    """What is wrong with its numbers: with these a query would read nothing, say."""
    match selection:
        case Window(recent=recent) | InfLLM(recent=recent) if recent < 1:
            return "a query reads its own token at least: RECENT begins at 1"
        case Quest(budget=budget) | DoubleSparsity(budget=budget) if budget < 1:
            return "TOKENS begins at 1"
        case SnapKV(capacity=capacity, window=window) if capacity <= window:
            return f"TOKENS must be more than the {window} newest, which always stay"
        case H2O(recent=0):
            return "a query reads its own token at least: RECENT is over 0"
        case H2O(heavy=heavy, recent=recent) if heavy + recent > 1:
            return "both are shares of the prompt, which together are at most 1"
        case XAttention(stride=stride, block=block) if stride < 1 or block % stride:
            return f"STRIDE must divide a block of {block} tokens"
        case XAttention(threshold=threshold) if not 0 < threshold <= 1:
            return "THRESHOLD is a share of the attention, over 0 and at most 1"
    return None
