"""Plans for KV caches of any format: which can be recorded, and which take each other's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from polydelta.kernels.kv_selection import FULL, Quest, Selection, SnapKV, Window
from polydelta.kernels.ops import AttentionShape, SequenceSlice
from polydelta.kernels.triton.kernels import TritonKernels
from polydelta.kernels.triton.kv_tables import Limits

Trial = Callable[..., Any]


def with_room(trial: Any, device: torch.device) -> Any:
    """Triton's attention for a cache that says how long sequences may be, as engines do."""
    kind = replace(trial.kind, shape=replace(trial.kind.shape, max_pages=40))
    return TritonKernels(device).kv_attention(kind)


def padded(
    trial: Any, parts: Sequence[tuple[int, int]], rows: int, selection: Selection = FULL
) -> list[SequenceSlice]:
    """parts: sequences and the contexts of their one token."""
    slices = [
        SequenceSlice(row, 1, context, trial.pages[number], selection, number)
        for row, (number, context) in enumerate(parts)
    ]
    return slices + [SequenceSlice(row, 1, 0, ()) for row in range(len(parts), rows)]


def test_a_plan_takes_the_place_of_another_for_as_many_rows(
    kv_trial: Trial, device: torch.device
) -> None:
    """Where the rest is padding, which gets zeros and is stored nowhere."""
    trial = kv_trial("int8", [50, 9], dtype=torch.float32, query_dtype=torch.float32)
    attention = with_room(trial, device)
    trial.step([(0, 0, 49, FULL), (1, 0, 8, FULL)])
    memory = replace(trial.memory, pages=trial.memory.pages.to(device, copy=True))
    recorded = attention.plan(padded(trial, [(1, 3)], 3))
    fresh = attention.plan(padded(trial, [(0, 50), (1, 9)], 3, Window(2, 30)))
    assert recorded.recordable
    assert fresh.recordable
    recorded.assume(fresh)
    rows = (
        torch.cat((each[0][-1:], each[1][-1:], each[1][:1])).to(device)
        for each in (trial.queries, trial.keys, trial.values)
    )
    out = attention.attend(recorded, 0, memory, *rows).cpu()
    wanted = trial.step([(0, 49, 50, Window(2, 30)), (1, 8, 9, FULL)])
    torch.testing.assert_close(out[:2], torch.cat(wanted), rtol=1e-5, atol=1e-5)
    assert not out[2].any()
    assert torch.equal(memory.pages.cpu(), trial.memory.pages)


@pytest.mark.parametrize(
    ("format", "selection", "length"),
    [
        ("int8", FULL, 2),
        ("kivi-4", FULL, 1),
        ("native", Quest(9), 1),
        ("native", SnapKV(40), 2),
    ],
    ids=str,
)
def test_what_a_page_or_a_choice_asks_for_is_not_recorded(
    kv_trial: Trial, device: torch.device, format: str, selection: Selection, length: int
) -> None:
    trial = kv_trial(format, [50], selection)
    attention = with_room(trial, device)
    plan = attention.plan([SequenceSlice(0, length, 50, trial.pages[0], selection, 0, 50)])
    assert not plan.recordable
    with pytest.raises(ValueError, match="only a plan for as many sequences"):
        plan.assume(plan)


def test_plans_for_other_numbers_of_rows_do_not_take_each_others_place(
    kv_trial: Trial, device: torch.device
) -> None:
    trial = kv_trial("int8", [20])
    attention = with_room(trial, device)
    two, three = (attention.plan(padded(trial, [(0, 5)], rows)) for rows in (2, 3))
    with pytest.raises(ValueError, match="only a plan for as many sequences"):
        two.assume(three)


def test_more_pages_than_a_plan_has_room_for_are_refused(
    kv_trial: Trial, device: torch.device
) -> None:
    trial = kv_trial("native", [300])
    with pytest.raises(ValueError, match="300 tokens do not fit 40 pages"):
        with_room(trial, device).plan(padded(trial, [(0, 300)], 1))


@pytest.mark.parametrize("window", [None, 1, 4, 7, 50])
@pytest.mark.parametrize("selection", [FULL, Window(0, 1), Window(3, 5), Window(20, 2)], ids=str)
def test_numbers_go_over_what_queries_see_and_nothing_twice(
    window: int | None, selection: Selection
) -> None:
    shape = AttentionShape(1, 1, 16, 4, window)
    for oldest, newest in ((0, 0), (0, 9), (9, 9), (6, 11), (30, 32)):
        part = SequenceSlice(0, newest + 1 - oldest, newest + 1, (), selection)
        limits = Limits.of(shape, part)
        seen = limits.seen(oldest, newest)
        positions = [
            number + seen.first + (seen.gap if number >= seen.sinks else 0)
            for number in range(seen.count)
        ]
        wanted = {
            token
            for query in range(oldest, newest + 1)
            for token in range(query + 1)
            if query - token < limits.window
            and (token < limits.sinks or query - token < limits.recent)
        }
        assert positions == sorted(set(positions))
        assert wanted <= set(positions)
        # What a single query does not see is not there.
        assert newest > oldest or set(positions) == wanted
