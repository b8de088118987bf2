"""Eviction in our own C against torch's, over the same pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.native import NativeLibrary, NativePool
from polydelta.kernels.cpu.native_eviction import NativeEviction
from polydelta.kernels.cpu.native_kv import NativeKVAttention
from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_eviction import Eviction, SequenceState
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.kv_selection import FULL, H2O, Selection, SnapKV
from polydelta.kernels.ops import SequenceSlice

Trial = Callable[..., Any]
Near = Callable[[Tensor, Tensor, torch.dtype], None]

SHAPES = [(3, 3, 16), (9, 3, 64), (4, 1, 40), (5, 1, 24)]


@pytest.fixture(scope="module")
def pool(decoder_library: NativeLibrary) -> NativePool:
    return decoder_library.open_pool(2)


@pytest.fixture
def trials(pool: NativePool, kv_trial: Trial) -> Callable[..., tuple[Any, Any]]:
    """The same sequence twice, for us and for torch."""

    def ours(kind: KVKind, device: torch.device) -> KVAttention:
        return NativeKVAttention(kind, pool, 2)

    def make(format: str, length: int, shape: tuple[int, int, int], **more: Any) -> tuple[Any, Any]:
        heads, kv_heads, head_dim = shape
        more |= {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        more |= {"dtype": torch.bfloat16, "query_dtype": torch.bfloat16}
        return (
            kv_trial(format, [length], attention=ours, **more),
            kv_trial(format, [length], **more),
        )

    return make


def step(trial: Any, first: int, part: SequenceSlice) -> Tensor:
    rows = slice(first, first + part.length)
    sides = (each[0][rows] for each in (trial.queries, trial.keys, trial.values))
    plan = trial.attention.plan([part])
    out: Tensor = trial.attention.attend(plan, trial.layer, trial.memory, *sides)
    return out


def eviction_of(trial: Any) -> Eviction:
    eviction: Eviction = trial.attention._eviction
    return eviction


@pytest.mark.parametrize(
    "format", ["native", "int8", "fp8", "int4", "mustafar-50", "kivi-4", "gear"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("length", "rows"), [(1, 1), (70, 32), (300, 300), (517, 1), (290, 33)])
def test_tokens_receive_what_attention_gives_them(
    trials: Any, near: Near, format: str, shape: tuple[int, int, int], length: int, rows: int
) -> None:
    _, trial = trials(format, length, shape)
    trial.step([(0, 0, length, FULL)])
    ours = trials(format, length, shape)[0].attention
    assert isinstance(ours._eviction, NativeEviction)
    part = SequenceSlice(0, length, length, trial.pages[0], FULL, 0)
    queries = trial.queries[0][-rows:]
    got = ours._eviction.received(part, trial.memory, queries)
    expected = eviction_of(trial).received(part, trial.memory, queries)
    # The C files round what is decoded to bfloat16.
    near(got, expected, torch.float32 if format == "native" else torch.bfloat16)
    assert got.sum(1).tolist() == pytest.approx([rows * shape[0] / shape[1]] * shape[1])


@pytest.mark.parametrize("format", ["native", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [0.05, 5.0])
def test_a_new_token_takes_the_place_of_another(
    trials: Any, near: Near, format: str, shape: tuple[int, int, int], spread: float
) -> None:
    prompt, total, selection = 60, 75, H2O(0.4, 0.2)
    kept, both = selection.kept(prompt), trials(format, total, shape)
    generator = torch.Generator().manual_seed(1)
    # Two tokens of each kind, so that roundings do not change which one is most alike.
    directions = torch.randn(total, *both[0].keys[0].shape[1:], generator=generator)
    near_to = directions[torch.randperm(total, generator=generator) // 2]
    # So far apart that roundings do not change who leaves.
    order = torch.rand(shape[1], kept, generator=generator).argsort(1).double() * 100
    positions = torch.rand(shape[1], prompt - 12, generator=generator).argsort(1)[:, : kept - 12]
    recent = torch.arange(prompt - 12, prompt).expand(shape[1], -1)
    positions = torch.cat((positions, recent), 1)
    for trial in both:
        trial.keys[0] = (near_to + spread * trial.keys[0].float()).to(torch.bfloat16)
        step(trial, 0, SequenceSlice(0, kept, kept, trial.pages[0], FULL, 0))
        state = SequenceState(order.clone(), positions.clone(), prompt)
        eviction_of(trial)._sequences[0][trial.layer] = state
    places = torch.arange(kept).expand(shape[1], -1)
    part = SequenceSlice(0, 1, kept, both[0].pages[0])
    for position in range(kept, total - prompt + kept):
        now = SequenceSlice(0, 1, kept + 1, both[0].pages[0], selection, 0, prompt)
        near(*(step(trial, position, now) for trial in both), torch.bfloat16)
        ours, its = (eviction_of(trial)._sequences[0][trial.layer] for trial in both)
        assert torch.equal(ours.positions, its.positions)
        near(ours.received, its.received, torch.bfloat16)
        stored = (trial.attention.load(trial.memory, part, places) for trial in both)
        for got, expected in zip(*stored, strict=True):
            if spread > 1 or format == "native":
                near(got, expected, torch.bfloat16)
            else:
                # Where a merged number lies between two codes, either may be right.
                assert float((got - expected).abs().mean() / expected.abs().mean()) < 0.005
        both[1].memory.pages.copy_(both[0].memory.pages)
    assert bool((ours.received > order.max() + 100).any()) == (spread < 1)


@pytest.mark.parametrize("selection", [SnapKV(40), H2O(0.3, 0.2)], ids=str)
def test_answers_are_those_of_torch(trials: Any, near: Near, selection: Selection) -> None:
    prompt, total = 80, 95
    both = trials("native", total, (9, 3, 64))
    assert isinstance(selection, SnapKV | H2O)
    kept = selection.kept(prompt)
    for first, last in [(0, 37), (37, prompt), *((i, i + 1) for i in range(prompt, total))]:
        context = last
        if first >= prompt:
            context = kept + 1 if isinstance(selection, H2O) else last - prompt + kept
        part = SequenceSlice(0, last - first, context, both[0].pages[0], selection, 0, prompt)
        ours, its = (
            step(trial, first, SequenceSlice(**{**vars(part), "pages": trial.pages[0]}))
            for trial in both
        )
        near(ours, its, torch.bfloat16)
