"""Recorded steps over caches of any format give what computing them anew gives, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_selection import (
    FULL,
    H2O,
    DoubleSparsity,
    InfLLM,
    Quest,
    Selection,
    Window,
)
from polydelta.kernels.ops import SequenceSlice

Trial = Callable[..., Any]

BF16 = torch.bfloat16
LENGTHS = [140, 31, 77]
LAYERS = 3


class Steps:
    """Decodes in all layers of a cache, whose contents are one layer's."""

    def __init__(self, kernels: Bfloat16Kernels, trial: Any) -> None:
        self.kernels = kernels
        self.trial = trial
        rows = len(LENGTHS) + 1
        shape = trial.kind.shape
        self.heads = shape.num_heads, shape.num_kv_heads
        self.size = rows, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim

    def inputs(self, contexts: Sequence[int], selections: Sequence[Selection]) -> list[Any]:
        """One row of each sequence, and one of nobody's."""
        slices = [
            SequenceSlice(row, 1, context, self.trial.pages[row], selection, row)
            for row, (context, selection) in enumerate(zip(contexts, selections, strict=True))
        ]
        slices.append(SequenceSlice(len(slices), 1, 0, ()))
        return [torch.randn(self.size).bfloat16(), self.trial.attention.plan(slices)]

    def run(self, inputs: Sequence[Any]) -> Tensor:
        qkv, plan = inputs
        queries, keys, values = qkv.split((self.heads[0], self.heads[1], self.heads[1]), 1)
        for layer in range(LAYERS):
            out = self.trial.attention.attend(plan, layer, self.trial.memory, queries, keys, values)
        return out


@pytest.fixture
def steps(ours: Bfloat16Kernels, kv_trial: Trial) -> Callable[..., Steps]:
    def make(format: str, selection: Selection) -> Steps:
        torch.manual_seed(0)
        trial = kv_trial(
            format,
            LENGTHS,
            selection,
            page_tokens=6,
            dtype=BF16,
            query_dtype=BF16,
            heads=6,
            layer=LAYERS,
            attention=lambda kind, _: ours.kv_attention(kind),
        )
        trial.step([(number, 0, length, FULL) for number, length in enumerate(LENGTHS)])
        return Steps(ours, trial)

    return make


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize(
    "selection", [FULL, Window(3, 8), Quest(20), DoubleSparsity(9), InfLLM(3, 9, 7)], ids=str
)
def test_a_replay_gives_what_computing_it_gives(
    steps: Callable[..., Steps], format: str, selection: Selection
) -> None:
    """With other lengths, other selections beside it, and pages that end; what is stored is the
    same, too."""
    made = steps(format, selection)
    chance = random.Random(0)
    size, memory = made.trial.size, made.trial.memory
    _, recorded = made.kernels.record(
        first := made.inputs([size + 1] * 3, [FULL] * 3), lambda: made.run(first)
    )
    assert recorded is not None
    replayed = 0
    for _ in range(12):
        contexts = [chance.randint(1, length) for length in LENGTHS]
        inputs = made.inputs(contexts, [chance.choice([FULL, selection]) for _ in LENGTHS])
        before = memory.pages.clone()
        expected = made.run(inputs).clone()
        stored = memory.pages.clone()
        if not inputs[1].recordable:
            continue
        memory.pages.copy_(before)
        assert torch.equal(recorded.replay(inputs), expected)
        assert torch.equal(memory.pages, stored)
        replayed += 1
    assert replayed > 3


@pytest.mark.parametrize(
    ("format", "recordable"), [("native", True), ("int4", True), ("kivi-4", False), ("gear", False)]
)
def test_pages_that_torch_encodes_end_in_steps_of_their_own(
    steps: Callable[..., Steps], format: str, recordable: bool
) -> None:
    made = steps(format, FULL)
    size = made.trial.size
    contexts = [2 * size, size - 1, size + 1]
    assert made.inputs(contexts, [FULL] * 3)[1].recordable == recordable
    contexts[0] += 1
    assert made.inputs(contexts, [FULL] * 3)[1].recordable


def test_steps_behind_which_tokens_leave_are_not_recorded(steps: Callable[..., Steps]) -> None:
    made = steps("native", FULL)
    assert not made.inputs([5, 6, 7], [FULL, H2O(), FULL])[1].recordable


def test_a_longer_step_does_not_take_the_memory_of_what_is_recorded(
    steps: Callable[..., Steps],
) -> None:
    made = steps("int8", Quest(20))
    held = made.inputs([2, 3, 4], [FULL] * 3)
    _, recorded = made.kernels.record(held, lambda: made.run(held))
    assert recorded is not None
    for contexts in ([140, 31, 77], [3, 1, 2], [100, 20, 60]):
        inputs = made.inputs(contexts, [Quest(20)] * 3)
        expected = made.run(inputs).clone()
        # Outgrows what plans share.
        made.inputs(contexts, [Quest(20)] * 3)[1]
        assert torch.equal(recorded.replay(inputs), expected)
