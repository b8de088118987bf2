"""What formats, selections and ways to prefill ask of the scheduler, in tokens."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, strategies as st

from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.blocks import Blocks
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.sequence import ScheduledSequence, Sequence
from polydelta.kernels.kv_selection import (
    FULL,
    H2O,
    DoubleSparsity,
    InfLLM,
    Quest,
    Selection,
    SnapKV,
    Window,
    XAttention,
)

EVICTING = (SnapKV(100), H2O())


def sequence_of(
    num_prompt: int, selection: Selection | None = None, virtual: int = 0, answers: int = 0
) -> Sequence:
    request = GenerationRequest("r", range(num_prompt), SamplingParams(), kv_select=selection)
    sequence = Sequence(request, lambda output: None)
    sequence.learn([AdapterTraits(virtual)])
    sequence.token_ids += range(answers)
    return sequence


def test_the_rules_need_no_torch() -> None:
    code = "import sys, polydelta.engine.kv_rules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_requests_own_selection_comes_before_the_servers() -> None:
    rules = KVRules(Quest())
    assert rules.of(sequence_of(3)) == Quest()
    assert rules.of(sequence_of(3, FULL)) == FULL


def test_only_what_changes_the_kv_of_prompts_has_a_namespace() -> None:
    plain = [FULL, Quest(), DoubleSparsity(), InfLLM()]
    assert {KVRules().namespace(sequence_of(3, one)) for one in plain} == {""}
    rules = [
        KVRules(),
        KVRules(Window(4, 8)),
        KVRules(Window(4, 9)),
        KVRules(kv_format="int8"),
        KVRules(Window(4, 8), kv_format="int8"),
        KVRules(prefill=XAttention()),
        KVRules(prefill=XAttention(16)),
    ]
    for one, other in combinations(rules, 2):
        assert one.namespace(sequence_of(3)) != other.namespace(sequence_of(3))


@given(
    rules=st.sampled_from(
        [KVRules(prefill=XAttention()), *map(KVRules, EVICTING), KVRules(Window(4, 50)), KVRules()]
    ),
    prompt=st.integers(1, 600),
    virtual=st.integers(0, 300),
    answers=st.integers(0, 40),
    budgets=st.lists(st.integers(1, 400), min_size=1, max_size=5),
)
def test_chunks_reach_the_end_and_stop_where_they_must(
    rules: KVRules, prompt: int, virtual: int, answers: int, budgets: list[int]
) -> None:
    """However little room some steps have, if one in a few has enough."""
    selection = rules.selection
    evicts = selection in EVICTING
    virtual = 0 if evicts else virtual
    least = 32 if evicts else 128 if rules.prefill else 1
    sequence = sequence_of(prompt, virtual=virtual, answers=answers)
    assert rules.problem(sequence, least, 1) is None
    step = 0
    while sequence.num_uncomputed:
        budget = [*budgets, least][step % (len(budgets) + 1)]
        step += 1
        room = min(budget, sequence.num_uncomputed)
        chunk = rules.next_chunk(sequence, room)
        assert 0 <= chunk <= room
        assert chunk or room < min(least, sequence.num_uncomputed)
        done, end = sequence.num_computed, sequence.num_computed + chunk
        if evicts and done < prompt and chunk:
            assert end <= prompt
            assert end < prompt or chunk >= min(32, prompt)
        if rules.prefill and done < prompt and chunk:
            assert end == prompt or (virtual + end) % 128 == 0
        if isinstance(selection, H2O) and done >= prompt:
            assert chunk == 1
        if isinstance(selection, Window):
            assert chunk <= selection.recent
        sequence.num_computed = end


@pytest.mark.parametrize(
    ("selection", "prefill", "start", "stop", "parts"),
    [
        (FULL, None, 3, 14, [(11, FULL)]),
        (Window(4, 8), None, 3, 14, [(11, Window(4, 8))]),
        (SnapKV(), None, 3, 10, [(7, SnapKV())]),
        (Quest(), None, 3, 10, [(7, FULL)]),
        (Quest(), None, 8, 13, [(2, FULL), *[(1, Quest())] * 3]),
        (InfLLM(), None, 10, 12, [(1, InfLLM()), (1, InfLLM())]),
        (FULL, XAttention(), 0, 10, [(10, XAttention())]),
        (FULL, XAttention(), 10, 13, [(3, FULL)]),
        (Quest(), XAttention(), 0, 10, [(10, XAttention())]),
        (Quest(), XAttention(), 10, 12, [(1, Quest()), (1, Quest())]),
    ],
)
def test_rows_are_cut_where_they_read_in_another_way(
    selection: Selection,
    prefill: XAttention | None,
    start: int,
    stop: int,
    parts: list[tuple[int, Selection]],
) -> None:
    sequence = sequence_of(10, selection, answers=9)
    sequence.num_computed = start
    item = ScheduledSequence(sequence, stop - start)
    assert KVRules(prefill=prefill).parts(item) == parts


@pytest.mark.parametrize(
    ("selection", "virtual", "prompt", "publishable"),
    [
        (Quest(), 0, 300, 300),
        (InfLLM(), 7, 300, 300),
        (SnapKV(), 0, 300, 0),
        (H2O(), 0, 300, 0),
    ],
)
def test_others_find_what_they_would_compute_themselves(
    selection: Selection, virtual: int, prompt: int, publishable: int
) -> None:
    sequence = sequence_of(prompt, selection, virtual, answers=50)
    assert KVRules().num_publishable(sequence) == publishable


@pytest.mark.parametrize(
    ("virtual", "prompt", "publishable"), [(0, 300, 256), (0, 127, 0), (7, 300, 249), (90, 30, 0)]
)
def test_of_xattentions_prompts_they_find_whole_blocks(
    virtual: int, prompt: int, publishable: int
) -> None:
    rules = KVRules(prefill=XAttention())
    sequence = sequence_of(prompt, virtual=virtual)
    assert rules.num_publishable(sequence) == publishable
    begins = [tokens for tokens in range(prompt) if rules.may_begin_at(sequence, tokens)]
    assert begins == [0, *range(128 - virtual, prompt, 128)]


@pytest.mark.parametrize(
    ("selection", "evicted", "most"),
    [(SnapKV(40), [0, 60, 60, 60], 100), (H2O(0.3, 0.2), [0, 50, 51, 52], 100)],
)
def test_evicted_tokens_take_no_places(selection: Any, evicted: list[int], most: int) -> None:
    rules = KVRules(selection)
    sequence = sequence_of(100, answers=3)
    found = []
    for computed in (99, 100, 101, 102):
        sequence.num_computed = computed
        sequence.num_evicted = rules.num_evicted(sequence)
        found.append(sequence.num_evicted)
        assert rules.num_places(sequence, computed + 1) <= most
    assert found == evicted
    assert rules.most_places(sequence, 103) == most
    assert rules.most_places(sequence, 70) == 70


def test_a_short_prompt_that_keeps_all_takes_a_place_for_each_answer_more() -> None:
    sequence = sequence_of(5, answers=20)
    assert KVRules(SnapKV(40)).most_places(sequence, 25) == 25
    assert KVRules(H2O(0.5, 0.5)).most_places(sequence, 25) == 5
    assert KVRules(H2O()).most_places(sequence_of(1), 9) == 2


@given(
    size=st.integers(1, 9),
    virtual=st.integers(0, 30),
    sinks=st.integers(0, 20),
    recent=st.integers(1, 20),
    computed=st.integers(0, 90),
)
def test_blocks_that_a_window_leaves_are_those_that_no_query_reads(
    size: int, virtual: int, sinks: int, recent: int, computed: int
) -> None:
    sequence = sequence_of(100, Window(sinks, recent), virtual)
    query = virtual + computed
    seen = {p for p in range(query + 1) if p < sinks or p > query - recent}
    unread = Blocks(size).within(sequence, KVRules().unread(sequence, computed))
    before = virtual // size
    for block in range(100):
        positions = range((before + block) * size, (before + block + 1) * size)
        if positions.stop <= query + 1:
            assert (block in unread) == seen.isdisjoint(positions)
        else:
            assert block not in unread
