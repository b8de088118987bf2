"""Attention over caches of any format in our own C, against torch's over the same pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.native_kv import NativeKVAttention
from polydelta.kernels.cpu.native_kv_layout import encodes_rows
from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_formats.scaled import Fp8
from polydelta.kernels.kv_memory import KVKind, KVMemory
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
Near = Callable[[Tensor, Tensor, torch.dtype], None]
WithThreads = Callable[[int], Bfloat16Kernels]

BF16 = torch.bfloat16
CHOICES = [Quest(24), DoubleSparsity(13), InfLLM(5, 9, 12)]


class Rounded:
    """A format whose numbers are what the C files make of them."""

    def __init__(self, format: Any) -> None:
        self._format = format

    def __getattr__(self, name: str) -> Any:
        return getattr(self._format, name)

    def decode(self, parts: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._format.decode(parts)
        return keys.bfloat16().float(), values.bfloat16().float()


class TorchsReading(KVAttention):
    """Ends of pages are torch's for both, where the C files do not encode them."""

    def __init__(self, kind: KVKind, device: torch.device) -> None:
        super().__init__(replace(kind, format=Rounded(kind.format)), device)
        self._whole = KVAttention(kind, device)

    def encode_open(self, memory: KVMemory, layer: int, pages: Tensor, slots: Tensor) -> None:
        self._whole.encode_open(memory, layer, pages, slots)


def torchs(kind: KVKind, device: torch.device) -> KVAttention:
    if not encodes_rows(kind):
        return TorchsReading(kind, device)
    return KVAttention(replace(kind, format=Rounded(kind.format)), device)


@pytest.fixture(params=[1, 3], ids=lambda threads: f"{threads} threads")
def both(
    with_threads: WithThreads, kv_trial: Trial, request: pytest.FixtureRequest
) -> Callable[..., tuple[Any, Any]]:
    """The same sequences for us and for torch."""
    kernels = with_threads(request.param)

    def make(*which: Any, **more: Any) -> tuple[Any, Any]:
        more = {"dtype": BF16, "query_dtype": BF16} | more
        ours = kv_trial(*which, attention=lambda kind, _: kernels.kv_attention(kind), **more)
        assert isinstance(ours.attention, NativeKVAttention)
        return ours, kv_trial(*which, attention=torchs, **more)

    return make


def check(got: Sequence[Tensor], expected: Sequence[Tensor], near: Near) -> None:
    for mine, wanted in zip(got, expected, strict=True):
        near(mine, wanted, BF16)
        assert float((mine - wanted).double().abs().mean()) < 2e-3


def same_pages(ours: Any, other: Any) -> None:
    """Byte for byte, those that nobody wrote as well; but a zero may have either sign where sums
    were taken in other orders."""
    for section in ours.kind.layout.sections:
        mine, its = (
            each.kind.layout.view(each.memory.pages, section.name).contiguous().view(torch.uint8)
            for each in (ours, other)
        )
        if isinstance(ours.kind.format, Fp8) and section.name in ("keys", "values"):
            mine, its = (codes.masked_fill(codes == 0x80, 0) for codes in (mine, its))
        assert torch.equal(mine, its), section.name


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens"),
    [
        (3, 3, 40, 5),
        (9, 1, 128, 37),
        (6, 2, 64, 33),
        (5, 5, 72, 1),
        (4, 2, 72, 40),
        (4, 1, 200, 70),
    ],
)
def test_all_formats_in_all_shapes(
    both: Callable[..., tuple[Any, Any]],
    near: Near,
    format: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
) -> None:
    """Pages too: they are shared by what is computed here and elsewhere."""
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    ours, other = both(format, [1, 39, 84], page_tokens=page_tokens, **sizes)
    check(ours.run(), other.run(), near)
    same_pages(ours, other)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_scales_may_be_as_large_as_numbers_are(
    both: Callable[..., tuple[Any, Any]], near: Near, format: str
) -> None:
    """Beyond them zero times the scale is not infinity times zero."""
    trials = both(format, [20, 9], page_tokens=4)
    for trial in trials:
        trial.values[0][3, 0, 5] = 300_000.0
        trial.queries[0] *= 0.1
    ours, other = (trial.run() for trial in trials)
    for mine, wanted in zip(ours, other, strict=True):
        assert torch.isfinite(mine).all()
        scale = wanted.double().abs().amax().clamp(min=1)
        near(mine / scale, wanted / scale, BF16)


@pytest.mark.parametrize("format", ["native", "int8", "kivi-2"])
@pytest.mark.parametrize("window", [None, 1, 8, 40, 100])
@pytest.mark.parametrize("selection", [FULL, Window(4, 6), Window(0, 1), Window(33, 35)], ids=str)
def test_windows(
    both: Callable[..., tuple[Any, Any]],
    near: Near,
    format: str,
    window: int | None,
    selection: Selection,
) -> None:
    ours, other = both(format, [133, 2, 70], selection, window=window, page_tokens=3)
    check(ours.run(selection, 40), other.run(selection, 40), near)


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("selection", CHOICES, ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 64), (1, 40), (9, 24)])
def test_choices(
    both: Callable[..., tuple[Any, Any]],
    near: Near,
    format: str,
    selection: Selection,
    kv_heads: int,
    head_dim: int,
) -> None:
    """Prompts are read in full, then each token of the answers chooses. 24 channels have 6 labels,
    40 have 10."""
    sizes = {"heads": 3 * kv_heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": 5}
    trials = both(format, [70, 56], selection, **sizes)
    outs = []
    for trial in trials:
        mine = trial.step([(0, 0, 61, FULL), (1, 0, 3, FULL)])
        for more in range(9):
            part = (1, 3 + 5 * more, 8 + 5 * more, FULL)
            mine += trial.step([part, (0, 61 + more, 62 + more, selection)])
        mine += trial.step([(1, 48 + more, 49 + more, selection) for more in range(5)])
        outs.append(mine)
    check(*outs, near)
    same_pages(*trials)


@pytest.mark.parametrize("selection", CHOICES, ids=str)
@pytest.mark.parametrize("format", ["native", "mustafar-50"])
def test_of_equal_scores_the_lower_position_is_chosen(
    both: Callable[..., tuple[Any, Any]], near: Near, format: str, selection: Selection
) -> None:
    """Sums of small whole numbers are exact, and often the same."""
    trials = both(format, [65], selection, whole_numbers=True, head_dim=8, page_tokens=3)
    outs = [
        trial.step([(0, 0, 40, FULL)])
        + [trial.step([(0, at, at + 1, selection)])[0] for at in range(40, 65)]
        for trial in trials
    ]
    check(*outs, near)


@pytest.mark.parametrize("head_dim", [36, 44])
def test_an_odd_number_of_labels(
    both: Callable[..., tuple[Any, Any]], near: Near, head_dim: int
) -> None:
    trials = both("native", [60], DoubleSparsity(7), head_dim=head_dim, page_tokens=4)
    check(*[trial.run(DoubleSparsity(7), 1) for trial in trials], near)


@pytest.mark.parametrize("selection", [FULL, *CHOICES, Quest(400), Window(10, 300)], ids=str)
@pytest.mark.parametrize("format", ["native", "int4"])
def test_long_contexts_are_shared_out(
    both: Callable[..., tuple[Any, Any]], near: Near, format: str, selection: Selection
) -> None:
    trials = both(format, [900, 530], selection, page_tokens=11)
    outs = []
    for trial in trials:
        mine = trial.step([(0, 0, 890, FULL), (1, 0, 529, FULL)])
        mine += trial.step([(0, 890, 891, selection), (1, 529, 530, selection)])
        mine += [trial.step([(0, at, at + 1, selection)])[0] for at in range(891, 900)]
        outs.append(mine)
    check(*outs, near)


@pytest.mark.parametrize("format", ["native", "int8", "gear"])
def test_pages_that_a_window_leaves_behind_are_not_asked_for(
    both: Callable[..., tuple[Any, Any]], near: Near, format: str
) -> None:
    selection = Window(sinks=3, recent=4)
    ours, other = both(format, [60], selection, page_tokens=2)
    for first in range(0, 60, 6):
        for block in range(len(ours.pages[0])):
            start, end = block * ours.size, (block + 1) * ours.size
            if start >= selection.sinks and end <= first + 1 - selection.recent:
                ours.pages[0][block] = -1
        parts = [(0, first, first + 6, selection)]
        check(ours.step(parts), other.step(parts), near)
    assert -1 in ours.pages[0]


@pytest.mark.parametrize("format", ["native", "int8", "fp8", "kivi-4"])
def test_pages_in_host_memory(
    both: Callable[..., tuple[Any, Any]], near: Near, format: str
) -> None:
    selection = InfLLM(6, 10, 12)
    trials = both(format, [96], selection, page_tokens=5, host_pages=40)
    outs = []
    for trial in trials:
        mine = trial.step([(0, 0, 84, FULL)])
        middle = range(-(-6 // trial.size), (84 - 10) // trial.size)
        trial.to_host(0, middle)
        mine += [trial.step([(0, at, at + 1, selection)])[0] for at in range(84, 96)]
        outs.append(mine)
    check(*outs, near)


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("selection", [FULL, Window(5, 40)], ids=str)
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(
    with_threads: WithThreads, kv_trial: Trial, format: str, selection: Selection
) -> None:
    """However many threads there are, and whoever is beside it."""

    def make(lengths: Sequence[int], threads: int) -> Any:
        return kv_trial(
            format,
            lengths,
            page_tokens=11,
            dtype=BF16,
            query_dtype=BF16,
            heads=6,
            head_dim=32,
            attention=lambda kind, _: with_threads(threads).kv_attention(kind),
        )

    whole = make([310], 1)
    (wanted,) = whole.step([(0, 0, 310, selection)])
    for threads in (1, 2, 5):
        parts = make([310, 600], threads)
        for side in ("queries", "keys", "values"):
            getattr(parts, side)[0] = getattr(whole, side)[0]
        got = parts.step([(0, 0, 290, selection), (1, 0, 597, FULL)])[:1]
        got += parts.step([(0, 290, 291, selection), (1, 597, 598, FULL)])[:1]
        got += [parts.step([(0, at, at + 1, selection)])[0] for at in range(291, 310)]
        assert torch.equal(torch.cat(got), wanted)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4", "mustafar-70"])
def test_what_is_not_a_number_is_stored_as_torch_stores_it(
    both: Callable[..., tuple[Any, Any]], format: str
) -> None:
    """Large numbers, small ones, zeros of both signs, and rows of nothing else."""
    torch.manual_seed(0)
    ours, other = both(format, [66], page_tokens=7, head_dim=64)
    rows = torch.randn(66, 2, 64) * 2.0 ** torch.randint(-40, 60, (66, 1, 1))
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -1e-40, 65504.0])
    rows = torch.where(torch.rand(66, 2, 64) < 0.2, odd[torch.randint(8, (66, 2, 64))], rows)
    rows[:6] = odd[:6, None, None]
    for trial in (ours, other):
        trial.keys[0], trial.values[0] = rows.bfloat16(), rows.flip(0).bfloat16()
        trial.run()
    same_pages(ours, other)


def test_rows_without_context_get_zeros_and_store_nothing(
    both: Callable[..., tuple[Any, Any]],
) -> None:
    trial, _ = both("int8", [5])
    nothing = SequenceSlice(start=0, length=2, context=0, pages=[], slot=-1)
    before = trial.memory.pages.clone()
    rows = [each[0][:2] for each in (trial.queries, trial.keys, trial.values)]
    # What its memory had before.
    trial.attention._pool.empty(*rows[0].shape).fill_(math.nan)
    out = trial.attention.attend(trial.attention.plan([nothing]), 0, trial.memory, *rows)
    assert out.tolist() == torch.zeros_like(rows[0]).tolist()
    assert torch.equal(trial.memory.pages, before)


def test_rows_are_read_from_a_fused_projection(both: Callable[..., tuple[Any, Any]]) -> None:
    trial, other = both("int8", [20], heads=4, kv_heads=2)
    (expected,) = trial.step([(0, 0, 20, FULL)])
    fused = torch.cat((other.queries[0], other.keys[0], other.values[0]), 1)
    plan = trial.attention.plan([SequenceSlice(0, 20, 20, trial.pages[0])])
    parts = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    assert torch.equal(trial.attention.attend(plan, 0, trial.memory, *parts), expected)


@pytest.mark.parametrize(
    "more",
    [{"dtype": torch.float32}, {"head_dim": 15}, {"head_dim": 258}, {"heads": 70, "kv_heads": 1}],
    ids=str,
)
def test_what_ours_do_not_take_is_left_to_torch(
    ours: Bfloat16Kernels, kv_trial: Trial, near: Near, more: dict[str, Any]
) -> None:
    more = {"dtype": BF16, "query_dtype": BF16} | more
    trials = [
        kv_trial("native", [30], attention=attention, **more)
        for attention in (lambda kind, _: ours.kv_attention(kind), torchs)
    ]
    assert not isinstance(trials[0].attention, NativeKVAttention)
    near(trials[0].run()[0], trials[1].run()[0], BF16)
