"""What slices of a step read of the KV cache, for kv_attend.c."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.kernels.cpu.native import Field, Struct
from polydelta.kernels.cpu.native_kv_layout import MOST_SCORES
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.kv_selection import DoubleSparsity, InfLLM, Quest, Window
from polydelta.kernels.ops import SequenceSlice

# As in the C files: tokens of a tile, of a part, and candidates that are scored in one go.
_TILE, _PART, _CANDIDATES = 32, 256, 256
# Lists of tokens that a thread goes through together.
_MOST_LISTS = 8
_BOUNDS, _LABELS, _REPRESENTATIVES = 1, 2, 3
# Items for each thread, so that none waits long for the last one.
_ITEMS = 4


class Workspace:
    """Memory for what a call of the C files keeps in between its items. It has no content between
    calls, so that all plans share it; those made before it grew have what was there then."""

    def __init__(self) -> None:
        self._parts = {
            torch.float32: torch.empty(0),
            torch.int32: torch.empty(0, dtype=torch.int32),
        }
        # Zeros whenever nobody computes.
        self._counters = torch.empty(0, dtype=torch.int32)

    def of(self, dtype: torch.dtype, count: int) -> Tensor:
        """float32 or int32, whatever is in them."""
        if len(self._parts[dtype]) < count:
            self._parts[dtype] = torch.empty(_power_of_two(count), dtype=dtype)
        return self._parts[dtype]

    def counters(self, count: int) -> Tensor:
        if len(self._counters) < count:
            self._counters = torch.zeros(_power_of_two(count), dtype=torch.int32)
        return self._counters


@dataclass(frozen=True)
class _Choice:
    """`KVChoice`: the best of so many candidates, for a list of so many tokens."""

    way: int
    first: int
    candidates: int
    chosen: int
    listed: int


class ReadingPlan:
    """Puts `KVPlan`s together."""

    def __init__(self, kind: KVKind, slices: Sequence[SequenceSlice], threads: int) -> None:
        """slices: with context each."""
        self._kind = kind
        self._slices = slices
        self._threads = threads

    def structs(self, workspace: Workspace) -> tuple[Struct, Struct]:
        """The second one for layers in which Quest reads all."""
        fields = self._fields(workspace, dense=False)
        if not any(isinstance(part.selection, Quest) for part in self._slices):
            return Struct(fields), Struct(fields)
        return Struct(fields), Struct(self._fields(workspace, dense=True))

    def _fields(self, workspace: Workspace, dense: bool) -> Sequence[Field]:
        shape = self._kind.shape
        choices = [_choice(self._kind, part, dense) for part in self._slices]
        parts = [
            -(-(choice.listed if choice else part.context) // _PART) if part.length == 1 else 0
            for part, choice in zip(self._slices, choices, strict=True)
        ]
        wanted = _ITEMS * self._threads
        enough = 2 * sum(parts) >= wanted and shape.num_heads <= MOST_SCORES
        padded = -(-shape.head_dim // _TILE) * _TILE
        at_once_if_one = max(1, sum(parts) // wanted)
        rows: list[int] = []
        pages: list[int] = []
        chosen: list[int] = []
        items = sums = counters = listed = scores = scoring = 0
        for number, (part, choice) in enumerate(zip(self._slices, choices, strict=True)):
            together = enough and bool(parts[number])
            if choice and shape.num_kv_heads > _MOST_LISTS:
                together = False
            heads = shape.num_kv_heads if together else 1
            at_once = min(at_once_if_one, parts[number])
            sinks, recent = _window(part)
            tokens = choice.listed if choice else 0
            rows += (part.start, part.length, part.context, part.slot, len(pages), sinks, recent)
            rows += (items, heads, parts[number], at_once, sums, counters, tokens, listed)
            pages += part.pages[: -(-part.context // self._kind.layout.block_size)]
            groups = shape.num_kv_heads // heads
            if parts[number]:
                items += groups * -(-parts[number] // at_once)
            else:
                group = shape.num_heads // shape.num_kv_heads
                items += groups * -(-part.length // (MOST_SCORES // group))
            sums += parts[number] * shape.num_heads * (padded + 2)
            counters += groups
            if choice:
                chosen += (number, choice.way, choice.first, choice.candidates, choice.chosen)
                chosen += (scoring, scores)
                scoring += -(-choice.candidates // _CANDIDATES)
                scores += -(-choice.candidates // _TILE) * _TILE * shape.num_heads
                listed += -(-tokens // _TILE) * _TILE * shape.num_kv_heads
        whole = workspace.of(torch.int32, listed + scores)
        return (
            shape.num_heads,
            shape.window or 0,
            len(self._slices),
            items,
            len(chosen) // 7,
            scoring,
            torch.tensor(rows),
            torch.tensor(chosen),
            torch.tensor(pages),
            workspace.of(torch.float32, sums),
            whole,
            whole[listed:],
            workspace.counters(counters),
            1.0 / math.sqrt(shape.head_dim),
        )


def _window(part: SequenceSlice) -> tuple[int, int]:
    match part.selection:
        case Window(sinks, recent):
            return sinks, recent
    return 0, 0


def _choice(kind: KVKind, part: SequenceSlice, dense: bool) -> _Choice | None:
    """As `kv_selecting.select`; None where all is read."""
    if kind.shape.window is not None:
        return None
    size, context = kind.layout.block_size, part.context
    own = (context - 1) // size
    match part.selection:
        case Quest() as quest if not dense:
            count = quest.num_pages(size)
            if own < count:
                return None
            listed = (count - 1) * size + context - own * size
            return _Choice(_BOUNDS, 1, own - 1, count - 2, listed)
        case DoubleSparsity(budget) if context > budget:
            return _Choice(_LABELS, 0, context - 1, budget - 1, budget)
        case InfLLM() as infllm:
            between, count = infllm.blocks(context, size), infllm.num_chosen(size)
            if len(between) <= count:
                return None
            listed = context - (len(between) - count) * size
            return _Choice(_REPRESENTATIVES, between.start, len(between), count, listed)
    return None


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
