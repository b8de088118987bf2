"""Attention over caches of any format in plain torch, against dense attention in float64 over what
the format makes of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_selection import FULL, Selection, Window
from polydelta.kernels.ops import SequenceSlice

Near = Callable[[Tensor, Tensor, torch.dtype], None]
Trial = Callable[..., Any]


def seen(position: int, window: int | None, selection: Selection) -> Tensor:
    """The definition: what the query at a position reads, `[position + 1]` bool."""
    tokens = range(position + 1)
    kept = [window is None or position - token < window for token in tokens]
    if isinstance(selection, Window):
        sinks, recent = selection.sinks, selection.recent
        kept = [
            also and (token < sinks or position - token < recent)
            for also, token in zip(kept, tokens, strict=True)
        ]
    return torch.tensor(kept)


def expected(trial: Any, number: int, selection: Selection = FULL) -> Tensor:
    """Of all of a sequence's queries, `[length, heads, head_dim]`."""
    shape, rows = trial.kind.shape, []
    for position in range(len(trial.queries[number])):
        reads = seen(position, shape.window, selection).expand(shape.num_kv_heads, -1)
        rows.append(trial.attended(number, position, reads))
    return torch.stack(rows)


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens"),
    [(3, 3, 16, 1), (4, 1, 40, 7), (6, 2, 64, 37)],
)
def test_queries_see_all_before_them_as_it_is_stored(
    kv_trial: Trial,
    near: Near,
    format: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    trial = kv_trial(format, [1, 37, 84], page_tokens=page_tokens, **sizes)
    for number, out in enumerate(trial.run()):
        near(out, expected(trial, number), torch.float64)


@pytest.mark.parametrize("format", ["native", "int4", "kivi-2"])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("selection", [FULL, Window(4, 6), Window(0, 1), Window(3, 100)], ids=str)
def test_queries_see_what_windows_leave_them(
    kv_trial: Trial, near: Near, format: str, window: int | None, selection: Selection
) -> None:
    trial = kv_trial(format, [43, 2], selection, window=window, page_tokens=3)
    for number, out in enumerate(trial.run(selection)):
        near(out, expected(trial, number, selection), torch.float64)


@pytest.mark.parametrize("format", ["native", "int8", "kivi-4"])
def test_pages_that_a_window_leaves_behind_are_not_asked_for(
    kv_trial: Trial, near: Near, format: str
) -> None:
    selection = Window(sinks=3, recent=4)
    trial = kv_trial(format, [60], selection, page_tokens=2)
    wanted = expected(trial, 0, selection)
    for first in range(0, 60, 6):
        for block in range(len(trial.pages[0])):
            start, end = block * trial.size, (block + 1) * trial.size
            if start >= selection.sinks and end <= first + 1 - selection.recent:
                trial.pages[0][block] = -1
        (out,) = trial.step([(0, first, first + 6, selection)])
        near(out, wanted[first : first + 6], torch.float64)
    assert -1 in trial.pages[0]


def test_slices_of_one_step_each_read_what_they_choose(kv_trial: Trial, near: Near) -> None:
    trial = kv_trial("int8", [21, 30, 9])
    chosen: list[Selection] = [Window(1, 2), FULL, Window(2, 5)]
    outs = trial.step([(number, 0, [21, 30, 9][number], chosen[number]) for number in (2, 0, 1)])
    for number, out in zip((2, 0, 1), outs, strict=True):
        near(out, expected(trial, number, chosen[number]), torch.float64)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_sequence_reads_the_same_however_its_prompt_was_cut_and_whoever_is_beside_it(
    kv_trial: Trial, near: Near, format: str
) -> None:
    whole = kv_trial(format, [75])
    in_steps = kv_trial(format, [75, 40, 66], seed=1)
    for side in ("queries", "keys", "values"):
        getattr(in_steps, side)[0] = getattr(whole, side)[0]
    (wanted,) = whole.step([(0, 0, 75, FULL)])
    near(in_steps.run()[0], wanted, torch.float64)
    # The pages too, byte for byte; the last one is not full.
    for mine, other in list(zip(whole.pages[0], in_steps.pages[0], strict=True))[:-1]:
        for section in whole.kind.layout.sections:
            ours, theirs = (
                trial.kind.layout.view(trial.memory.pages, section.name)[page]
                for trial, page in ((whole, mine), (in_steps, other))
            )
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("format", ["native", "int4", "gear"])
def test_a_sequence_that_goes_on_behind_cached_pages_reads_them(
    kv_trial: Trial, near: Near, format: str
) -> None:
    trial = kv_trial(format, [53, 53])
    blocks = 53 // trial.size
    cached = blocks * trial.size
    for side in (trial.queries, trial.keys, trial.values):
        side[1][:cached] = side[0][:cached]
    trial.step([(0, 0, 53, FULL)])
    trial.pages[1][:blocks] = trial.pages[0][:blocks]
    (out,) = trial.step([(1, cached, 53, FULL)])
    near(out, expected(trial, 1)[cached:], torch.float64)


@pytest.mark.parametrize("format", ["native", "fp8", "kivi-2"])
def test_more_tokens_than_are_looked_at_together(
    kv_trial: Trial, near: Near, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr("polydelta.kernels.kv_attention._AT_ONCE", 7)
    trial = kv_trial(format, [45], window=20)
    near(trial.run(most=30)[0], expected(trial, 0), torch.float64)


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_of_the_models_own_dtype(
    kv_trial: Trial, near: Near, format: str, dtype: torch.dtype
) -> None:
    trial = kv_trial(format, [33, 18], dtype=dtype, query_dtype=dtype, page_tokens=9)
    for number, out in enumerate(trial.run()):
        assert out.dtype == dtype
        near(out, expected(trial, number), dtype)


@pytest.mark.parametrize("format", ["native", "kivi-4"])
def test_rows_without_context_get_zeros_and_store_nothing(kv_trial: Trial, format: str) -> None:
    trial = kv_trial(format, [5])
    nothing = SequenceSlice(start=0, length=2, context=0, pages=[], slot=-1)
    before = trial.memory.pages.clone()
    rows = [each[0][:2] for each in (trial.queries, trial.keys, trial.values)]
    out = trial.attention.attend(trial.attention.plan([nothing]), 0, trial.memory, *rows)
    assert out.tolist() == torch.zeros_like(rows[0]).tolist()
    assert torch.equal(trial.memory.pages, before)
