"""Attention over caches of any format in our own C: over all that came before, with windows, and
with what selections choose, against float64 and against torch's over the same pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.native import NativeLibrary, NativePool
from polydelta.kernels.cpu.native_kv import NativeKVAttention
from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.kv_selection import (
    FULL,
    DoubleSparsity,
    InfLLM,
    Quest,
    Selection,
    Window,
)
from polydelta.kernels.ops import SequenceSlice

Trial = Callable[..., Any]
SHAPES = [(3, 3, 40, 5), (9, 3, 64, 15), (4, 1, 128, 33)]
CHOICES = [Quest(24), DoubleSparsity(19), InfLLM(7, 20, 24), Window(3, 17)]
BF16 = {"dtype": torch.bfloat16, "query_dtype": torch.bfloat16}


@pytest.fixture(scope="module", params=[1, 3])
def pool(decoder_library: NativeLibrary, request: pytest.FixtureRequest) -> NativePool:
    return decoder_library.open_pool(request.param)


@pytest.fixture
def ours(pool: NativePool) -> Callable[[KVKind, torch.device], KVAttention]:
    return lambda kind, _: NativeKVAttention(kind, pool, 3)


def check(got: Tensor, expected: Tensor, format: str) -> None:
    """Rounded to bfloat16: keys, values and weights once each. A row in few bits may be rounded to
    the next step where ours and torch's differ before."""
    error = (got.double() - expected.double()).abs()
    loose = 4 if format in ("int4", "kivi-4", "kivi-2", "gear") else 1
    assert error.mean() < 4e-3 * loose, float(error.mean())
    assert error.max() < 4e-2 * loose, float(error.max())


def attended(trial: Any, number: int) -> Tensor:
    kv_heads = trial.kind.shape.num_kv_heads
    positions = range(len(trial.queries[number]))
    everything = (torch.ones(kv_heads, position + 1, dtype=torch.bool) for position in positions)
    each = zip(positions, everything, strict=True)
    return torch.stack([trial.attended(number, position, reads) for position, reads in each])


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_tokens"), SHAPES, ids=str)
def test_queries_see_all_before_them_as_it_is_stored(
    kv_trial: Trial,
    ours: Callable,
    format: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    trial = kv_trial(format, [1, 37, 131], page_tokens=page_tokens, attention=ours, **sizes, **BF16)
    for number, out in enumerate(trial.run(most=40)):
        check(out, attended(trial, number), format)


@pytest.mark.parametrize("format", ["native", "int8", "int4", "mustafar-50"])
@pytest.mark.parametrize("selection", CHOICES, ids=str)
def test_answers_read_what_torch_chooses(
    kv_trial: Trial, ours: Callable, format: str, selection: Selection
) -> None:
    """The first 60 tokens of each are a prompt; then one at a time. Numbers are small and whole, so
    that sums are exact and ties are many."""
    of_prompts = selection if isinstance(selection, Window) else FULL
    sizes = {"heads": 6, "kv_heads": 2, "head_dim": 32, "page_tokens": 4, "whole_numbers": True}
    outs = []
    for attention in (ours, KVAttention):
        trial = kv_trial(format, [92, 75], selection, attention=attention, **sizes, **BF16)
        trial.step([(0, 0, 60, of_prompts), (1, 0, 60, of_prompts)])
        steps = []
        for position in range(60, 75):
            parts = [(number, position, position + 1, selection) for number in (1, 0)]
            steps.append(torch.stack(trial.step(parts)))
        # As they are computed again after a preemption: several in one step.
        rest = [(0, position, position + 1, selection) for position in range(75, 92)]
        outs.append(torch.cat([torch.cat(steps).flatten(0, 1), torch.cat(trial.step(rest))]))
    check(*outs, format)


@pytest.mark.parametrize("format", ["native", "int8"])
def test_pages_in_host_ram_are_read_where_they_are(
    kv_trial: Trial, ours: Callable, format: str
) -> None:
    selection = InfLLM(5, 13, 16)
    trial = kv_trial(format, [70], selection, attention=ours, host_pages=6, **BF16)
    (before,) = trial.step([(0, 0, 69, FULL)])[:1]
    (near,) = trial.step([(0, 69, 70, selection)])
    trial.to_host(0, [3, 4, 5, 7])
    (away,) = trial.step([(0, 69, 70, selection)])
    assert torch.equal(near, away)
    assert before.isfinite().all()


@pytest.mark.parametrize(
    ("format", "when_closing"), [("native", True), ("int8", True), ("int4", True), ("gear", False)]
)
def test_a_decode_step_is_recordable_unless_torch_encodes_a_page(
    kv_trial: Trial, ours: Callable, format: str, when_closing: bool
) -> None:
    trial = kv_trial(format, [50, 50], Quest(12), attention=ours, page_tokens=9, **BF16)
    size = trial.size
    plans = []
    for last in (size + 2, size):
        slices = [
            SequenceSlice(row, 1, last, trial.pages[row], Quest(12), row, last - 1)
            for row in range(2)
        ]
        plans.append(trial.attention.plan(slices).recordable)
    assert plans == [True, when_closing]
