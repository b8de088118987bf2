"""Sequences with selections of their own, in formats of any kind. Every `world.step` also checks
the books, and that each sequence reads its own KV (see `conftest.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.kv_composition import Option, apart, row_of
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.preemption_mode import PreemptionMode
from polydelta.engine.sequence import GIVEN_BACK, Sequence
from polydelta.kernels.kv_selection import (
    EVICTING,
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

# The class `World` of conftest.py.
Worlds = Any

SWAP, RECOMPUTE = PreemptionMode.SWAP, PreemptionMode.RECOMPUTE


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of prompts, and windows of queries, that short prompts have too."""
    monkeypatch.setattr(XAttention, "block", 8)
    monkeypatch.setattr(SnapKV, "window", 4)


def held(sequence: Sequence) -> int:
    return sum(page != GIVEN_BACK for page in sequence.block_table)


def test_a_prompt_much_longer_than_the_pool_runs_with_a_window(world: Worlds) -> None:
    w = world(num_pages=7, block_size=4)
    sequence = w.submit(range(203), max_tokens=30, kv_select=Window(3, 8))
    most = 0
    while sequence not in w.finished:
        w.step()
        most = max(most, held(sequence))
    assert len(w.tokens[sequence]) == 233
    assert most <= 6
    assert w.scheduler.num_preemptions == 0


def test_without_a_window_it_is_refused(world: Worlds) -> None:
    w = world(num_pages=7, block_size=4)
    sequence = w.submit(range(203), max_tokens=30)
    w.step()
    assert "needs 59 pages of the pool" in w.failed[sequence]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("selection", [Window(0, 1), Window(5, 1), Window(2, 3), Window(0, 9)])
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_a_window_holds_no_more_pages_than_were_asked_for(
    lag: int, selection: Window, block_size: int, world: Worlds
) -> None:
    most = KVRules(selection)
    probe = world(num_pages=99, block_size=block_size, rules=most)
    sequence = probe.submit(range(60), max_tokens=30)
    need = probe.kv.most_pages(sequence, 90)
    w = world(num_pages=need, block_size=block_size, rules=most, lag=lag)
    sequence = w.submit(range(60), max_tokens=30)
    w.drain()
    assert len(w.tokens[sequence]) == 90
    assert w.scheduler.num_preemptions == 0


def test_pages_are_looked_through_only_in_steps_that_leave_one(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(num_pages=20, block_size=4)
    held_after: list[int] = []
    leave_pages = w.kv.leave_pages

    def noted(sequence: Sequence) -> None:
        before = held(sequence)
        leave_pages(sequence)
        held_after.append(held(sequence) - before)

    monkeypatch.setattr(w.kv, "leave_pages", noted)
    w.submit(range(9), max_tokens=40, kv_select=Window(4, 6))
    w.drain()
    # Of 48 tokens with KV, and 12 pages: the first one, and what the last query reads.
    assert held_after == [-1] * 9


def test_another_finds_what_a_window_gave_back_and_takes_only_what_it_reads(world: Worlds) -> None:
    w = world(num_pages=40, block_size=2, rules=KVRules(Window(2, 4)))
    w.submit(range(40))
    w.drain()
    again = w.submit([*range(40), 7, 7, 7], max_tokens=5)
    w.step()
    assert again.num_cached == 40
    assert held(again) <= 1 + 3 + 2
    w.drain()


def test_blocks_behind_one_that_was_evicted_stay_while_they_are_used(world: Worlds) -> None:
    w = world(num_pages=30, block_size=2, rules=KVRules(Window(2, 4)))
    sequence = w.submit(range(30), max_tokens=9)
    while sequence.num_computed < 30:
        w.step()
    used = [page for page in sequence.block_table if page != GIVEN_BACK]
    pages = w.pool.allocate(w.pool.num_available)  # everything idle leaves
    assert not set(pages) & set(used)
    w.pool.free(pages)
    # The first block is in use, and stays known; those behind the hole are not found again.
    other = w.submit(range(30), max_tokens=1)
    w.step()
    assert other.num_cached == 2
    w.drain()


def test_windows_of_other_sizes_share_nothing(world: Worlds) -> None:
    w = world(num_pages=40, block_size=2)
    for selection in (None, Window(2, 4), Window(2, 5), Window(2, 4)):
        w.submit(range(12), kv_select=selection)
        w.drain()
    assert [s.num_cached for s in w.submitted] == [0, 0, 0, 10]


@pytest.mark.parametrize("selection", [Quest(3), DoubleSparsity(5), InfLLM(2, 4, 3)])
def test_what_is_chosen_by_query_shares_prompts_only(selection: Selection, world: Worlds) -> None:
    w = world(num_pages=40, block_size=2)
    first = w.submit(range(9), max_tokens=8, kv_select=selection)
    w.drain()
    whole = w.tokens[first]
    second = w.submit(whole, max_tokens=1)
    w.drain()
    assert second.num_cached == 8
    # Nor does it take answers of those who read all: as a prompt of its own it may.
    third = w.submit(whole, max_tokens=1, kv_select=selection)
    w.drain()
    assert third.num_cached == 16


@pytest.mark.parametrize("selection", [SnapKV(6), H2O(0.3, 0.2)])
def test_what_evicts_keeps_as_many_places_as_it_says_and_shares_nothing(
    selection: SnapKV | H2O, world: Worlds
) -> None:
    w = world(num_pages=40, block_size=2, max_batch_tokens=11)
    w.submit(range(30))
    w.drain()
    cached = w.stats().pages_cached
    sequence = w.submit(range(30), max_tokens=12, kv_select=selection)
    while sequence.num_computed < 30:
        assert sequence.num_evicted == 0
        w.step()
    assert sequence.num_cached == 0
    kept = selection.kept(30)
    assert sequence.num_evicted == 30 - kept
    assert held(sequence) == kept // 2 + 1
    w.step()
    assert sequence.num_evicted == 30 - kept + isinstance(selection, H2O)
    w.drain()
    assert w.stats().pages_cached == cached
    assert len(w.tokens[sequence]) == 42


@pytest.mark.parametrize("selection", [SnapKV(6), H2O()])
def test_what_evicts_is_refused_behind_virtual_tokens(selection: Selection, world: Worlds) -> None:
    w = world(adapters={"p": 1}, traits={"p": AdapterTraits(num_prefix_tokens=6)})
    sequence = w.submit(range(5), "p", kv_select=selection)
    w.step()
    w.host.finish()
    w.step()
    assert w.failed[sequence].startswith(f"KV selection {selection} evicts tokens of its own pages")
    w.check()


@pytest.mark.parametrize("rules", [KVRules(SnapKV(6)), KVRules(H2O()), KVRules(FULL, XAttention())])
def test_a_prompt_whose_chunk_no_step_has_room_for_is_refused(
    rules: KVRules, world: Worlds
) -> None:
    w = world(max_batch_tokens=5, max_batch_size=3, rules=rules)
    sequence = w.submit(range(12))
    w.step()
    assert "a step may have room for 3 only" in w.failed[sequence]
    assert w.submit(range(3)) not in w.failed
    w.drain()


def test_chunks_of_xattention_end_with_its_blocks_and_prefixes_too(world: Worlds) -> None:
    w = world(
        num_pages=60,
        block_size=3,
        max_batch_tokens=15,
        max_batch_size=2,
        rules=KVRules(prefill=XAttention()),
    )
    sequence = w.submit(range(37), max_tokens=4)
    sizes = []
    while sequence.num_computed < 37:
        sizes += [item.num_tokens for item in w.step()]
    assert sizes == [8, 8, 8, 13]
    w.drain()
    again = w.submit([*range(37), 1], max_tokens=1)
    w.drain()
    assert again.num_cached == 24  # of blocks of 3 and of 8


def test_blocks_of_xattention_are_known_by_all_tokens_that_were_chosen_with_them(
    world: Worlds,
) -> None:
    w = world(num_pages=60, block_size=2, rules=KVRules(prefill=XAttention()))
    for last in (1, 2, 1):
        w.submit([*range(10, 17), last, 30, 31], max_tokens=1)
        w.drain()
    assert [s.num_cached for s in w.submitted] == [0, 0, 8]
    assert w.stats().pages_cached == 2 * 4


def test_distant_blocks_lie_in_host_ram_as_far_as_there_is_room(world: Worlds) -> None:
    w = world(num_pages=40, block_size=2, host_kv_pages=5, rules=KVRules(InfLLM(3, 4, 6)))
    sequence = w.submit(range(18), max_tokens=9)
    w.step()
    assert w.host_kv.num_used == 5
    away = [index for index, page in enumerate(sequence.block_table) if page >= 40]
    assert away == [2, 3, 4, 5, 6]  # of positions 4 to 13; the next query reads from 15 on
    w.drain()
    assert w.host_kv.num_used == 0


def test_what_lies_in_host_ram_is_still_found_in_the_pool(world: Worlds) -> None:
    w = world(num_pages=40, block_size=2, host_kv_pages=5, rules=KVRules(InfLLM(3, 4, 6)))
    w.submit(range(18), max_tokens=9)
    w.step()
    other = w.submit(range(18), max_tokens=2, kv_select=FULL)
    w.step()
    assert other.num_cached == 16
    w.drain()


@pytest.mark.parametrize(
    "selection", [Window(2, 4), InfLLM(2, 4, 2), SnapKV(6), H2O(), Quest(3), FULL]
)
@pytest.mark.parametrize("by_page", [False, True])
def test_only_those_whose_pages_are_all_there_are_swapped(
    selection: Selection, by_page: bool, world: Worlds
) -> None:
    w = world(
        num_pages=40,
        block_size=2,
        host_kv_pages=30,
        rules=KVRules(selection, by_page=by_page),
        prefix_caching=False,
    )
    sequence = w.submit(range(19), max_tokens=9)
    while sequence.num_computed < 21:
        w.step()
    w.scheduler._preempt(sequence)
    swaps = selection in (Quest(3), FULL)
    assert w.scheduler.preemption.counts == {SWAP: swaps, RECOMPUTE: not swaps}
    assert w.host_kv.num_used == (0 if not swaps else 10 if by_page else 11)
    w.drain()
    assert len(w.tokens[sequence]) == 28


SELECTIONS: list[Selection | None] = [
    None,
    FULL,
    Window(0, 1),
    Window(3, 4),
    Window(5, 2),
    Quest(4),
    DoubleSparsity(3),
    InfLLM(1, 3, 2),
    InfLLM(4, 2, 2),
    SnapKV(6),
    H2O(0.3, 0.3),
    H2O(0.0, 0.1),
]


class SelectionHistory(RuleBasedStateMachine):
    """Sequences of all selections beside each other, in a pool that is too small."""

    worlds: Worlds

    @initialize(
        num_pages=st.integers(8, 40),
        block_size=st.integers(1, 4),
        host_kv_pages=st.sampled_from([0, 1, 6, 100]),
        max_batch_size=st.integers(1, 4),
        max_batch_tokens=st.integers(1, 20),
        prefix_caching=st.sampled_from([True, True, False]),
        virtual=st.integers(1, 9),
        max_positions=st.sampled_from([20, 45, 90]),
        lag=st.integers(0, 1),
        policy=st.sampled_from(["fair", "fcfs", "priority"]),
        adapter_share=st.sampled_from([None, None, 0.5]),
        selection=st.sampled_from(SELECTIONS),
        way=st.sampled_from(["native", "native", "int4", "kivi-4", "xattention"]),
    )
    def start(self, virtual: int, selection: Selection | None, way: str, **limits: Any) -> None:
        self.way = way
        xattention = XAttention() if way == "xattention" else None
        kv_format = "native" if xattention else way
        rules = KVRules(self.where_it_composes(selection) or FULL, xattention, kv_format)
        rules = replace(rules, by_page=way == "kivi-4")
        traits = {
            "prefix": AdapterTraits(virtual),
            "activated": AdapterTraits(virtual // 2, invocation=(1,)),
        }
        adapters = {"a": 2, "b": 1, "prefix": 0, "activated": 1}
        self.w = self.worlds(adapters=adapters, traits=traits, rules=rules, **limits)
        self.gone: list[Sequence] = []

    def where_it_composes(self, selection: Selection | None) -> Selection | None:
        option = Option.PREFILL if self.way == "xattention" else Option.FORMAT
        if selection is None:
            return None
        own, other = row_of(Option.SELECT, selection.name), row_of(option, self.way)
        return None if apart(own, other) else selection

    @rule(
        adapter=st.sampled_from([None, None, "a", "a+b", "prefix", "activated"]),
        shared=st.integers(0, 26),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=9),
        max_tokens=st.integers(1, 12),
        priority=st.sampled_from([0, 0, -2, 5]),
        selection=st.sampled_from(SELECTIONS),
    )
    def submit(
        self,
        adapter: str | None,
        shared: int,
        own: list[int],
        max_tokens: int,
        priority: int,
        selection: Selection | None,
    ) -> None:
        selection = self.where_it_composes(selection)
        prompt = [*range(10, 10 + shared), *own]
        if len(prompt) < self.w.limits.max_positions:
            self.w.submit(prompt, adapter, max_tokens, priority=priority, kv_select=selection)

    @rule(data=st.data(), selection=st.sampled_from(SELECTIONS))
    def follow(self, data: st.DataObject, selection: Selection | None) -> None:
        """The next turn of a conversation."""
        selection = self.where_it_composes(selection)
        if not self.w.finished:
            return
        tokens = self.w.tokens[data.draw(st.sampled_from(self.w.finished), "whom")]
        if len(tokens) < self.w.limits.max_positions:
            self.w.submit(tokens, max_tokens=2, kv_select=selection)

    @rule(times=st.integers(1, 6), loads=st.booleans())
    def step(self, times: int, loads: bool) -> None:
        for _ in range(times):
            self.w.step()
        if loads:
            self.w.host.finish()

    @precondition(lambda self: self.w.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.w.scheduler._preempt(data.draw(st.sampled_from(self.w.scheduler.running), "whom"))

    @precondition(lambda self: self.w.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.w.live, key=lambda s: int(s.id))), "whom")
        self.w.scheduler.remove(sequence)
        self.gone.append(sequence)

    @rule(share=st.floats(0.1, 1.0))
    def evict(self, share: float) -> None:
        """Others need room, for a moment."""
        pool = self.w.pool
        pool.free(pool.allocate(round(share * pool.num_available)))

    @rule(adapter=st.sampled_from(["a", "b", "prefix", "activated"]))
    def delete(self, adapter: str) -> None:
        self.w.forget(adapter)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "w"):
            self.w.check()
            for sequence in self.w.scheduler.running:
                if isinstance(self.w.rules.of(sequence), EVICTING):
                    assert not sequence.num_published

    def teardown(self) -> None:
        if not hasattr(self, "w"):
            return
        self.w.drain()
        assert self.w.host_kv.num_used == 0
        ends = [*self.w.finished, *self.w.failed, *self.gone]
        assert len(ends) == len(self.w.submitted)
        assert set(ends) == set(self.w.submitted)


def test_random_histories_of_selections_keep_every_promise(world: Worlds) -> None:
    class History(SelectionHistory):
        worlds = world

    run_state_machine_as_test(
        History, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
