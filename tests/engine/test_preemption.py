"""Preempted sequences have their KV back from host RAM, or by recomputation. Every `world.step`
also checks the books, and that each sequence reads its own KV (see `conftest.py`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence as Seq
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
from polydelta.engine.adapter_control import AdapterControl
from polydelta.engine.eviction import CostModel
from polydelta.engine.policies import POLICIES
from polydelta.engine.pool import PageAllocator
from polydelta.engine.preemption import Swapping
from polydelta.engine.preemption_mode import PreemptionMode
from polydelta.engine.scheduler import Scheduler
from polydelta.engine.sequence import Sequence

# The class `World` of conftest.py.
Worlds = Any

SWAP, RECOMPUTE = PreemptionMode.SWAP, PreemptionMode.RECOMPUTE


class FakeHostKV:
    """Host pages that hold what the world's pages do."""

    page_bytes = 1000

    def __init__(self, memory: dict[int, list[object]], num_pages: int) -> None:
        self._memory = memory
        self._allocator = PageAllocator(num_pages)
        self._saved: dict[int, list[object]] = {}
        # What is measured of copies and prefills, as a test says.
        self.costs = CostModel()
        # Pages that were copied back.
        self.num_restored = 0

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_used(self) -> int:
        return self._allocator.num_pages - self.num_free

    def save(self, pages: Seq[int]) -> list[int]:
        assert 0 < len(pages) <= self.num_free
        saved = self._allocator.take(len(pages))
        self._saved |= {to: list(self._memory[page]) for to, page in zip(saved, pages, strict=True)}
        return saved

    def restore(self, saved: Seq[int], pages: Seq[int]) -> None:
        for source, page in zip(saved, pages, strict=True):
            self._memory[page] = list(self._saved[source])
        self.num_restored += len(saved)

    def drop(self, saved: Seq[int]) -> None:
        self._allocator.give_back(saved)
        for page in saved:
            del self._saved[page]


def swapping_world(
    world: Worlds, host_pages: int = 100, policy: str = "fcfs", **options: Any
) -> tuple[Any, FakeHostKV]:
    """A world whose preempted sequences may go to host RAM; copies cost nothing at first."""
    w = world(policy=policy, **options)
    host = FakeHostKV(w.memory, host_pages)
    swapping = Swapping(w.kv, host.costs, host)
    managers = (w.pools, w.kv, w.residency)
    w.scheduler = Scheduler(w.limits, POLICIES[policy](), *managers, swapping, lambda: w.now)
    w.control = AdapterControl(*managers, w.scheduler)
    return w, host


def step_until_preempted(w: Any, sequence: Sequence, times: int = 1) -> None:
    """Ends when it waits again."""
    for _ in range(200):
        if sequence.num_preemptions >= times:
            return
        w.step()
    raise AssertionError("nobody was preempted")


def step_until_running(w: Any, sequence: Sequence) -> int:
    """Ends when it runs again. Returns how many tokens the step computed of it."""
    for _ in range(200):
        for item in w.step():
            if item.sequence is sequence:
                return int(item.num_tokens)
    raise AssertionError("it never came back")


def two_that_do_not_fit(world: Worlds, **options: Any) -> tuple[Any, FakeHostKV, Sequence]:
    """Two sequences, the younger of which is preempted in the next steps."""
    w, host = swapping_world(world, num_pages=9, block_size=3, **options)
    w.submit(range(10), max_tokens=14)
    young = w.submit(range(20, 31), max_tokens=9)
    return w, host, young


def test_preemption_needs_no_torch() -> None:
    code = "import sys, polydelta.engine.preemption; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_swapped_sequence_goes_on_where_it_was(
    lag: int, prefix_caching: bool, world: Worlds
) -> None:
    w, host, young = two_that_do_not_fit(world, lag=lag, prefix_caching=prefix_caching)
    computed = 0
    while not young.num_preemptions:
        computed = max(computed, young.num_computed)
        w.step()
    assert w.scheduler.preemption.counts == {SWAP: 1, RECOMPUTE: 0}
    pages = -(-computed // 3)
    assert host.num_used == pages
    assert w.stats().host_kv_bytes == pages * 1000
    assert step_until_running(w, young) == 1, "it was computed again"
    assert host.num_used == 0
    w.drain()
    assert w.scheduler.preemption.counts[SWAP] == w.scheduler.num_preemptions
    assert [len(w.tokens[s]) for s in w.submitted] == [24, 20]


def test_what_the_prefix_cache_still_has_is_not_copied_back(world: Worlds) -> None:
    w, host, young = two_that_do_not_fit(world)
    step_until_preempted(w, young)
    saved = host.num_used
    assert saved == 5
    w.scheduler.remove(w.submitted[0])  # its pages are enough: nothing idle has to go
    assert step_until_running(w, young) == 1
    assert 0 < host.num_restored < saved
    w.drain()


def test_without_room_in_host_ram_it_is_recomputed_and_what_is_saved_stays(world: Worlds) -> None:
    w, host = swapping_world(world, num_pages=14, block_size=2, host_pages=5, prefix_caching=False)
    for start in (0, 20, 40):
        w.submit(range(start, start + 7), max_tokens=16)
    _, second, third = w.submitted
    step_until_preempted(w, third)
    saved = host.num_used
    assert saved in (4, 5)
    step_until_preempted(w, second)
    assert w.scheduler.preemption.counts == {SWAP: 1, RECOMPUTE: 1}
    assert host.num_used == saved
    assert step_until_running(w, second) > 1
    assert step_until_running(w, third) == 1
    w.drain()


def test_where_copies_are_measured_dearer_it_is_recomputed(world: Worlds) -> None:
    w, host, young = two_that_do_not_fit(world)
    costs = host.costs
    # Of a page: three tokens, and 1,000 bytes out and back.
    costs.observe_swap(2000, 1.01 * costs.prefill_seconds(3))
    step_until_preempted(w, young)
    assert host.num_used == 0
    assert w.scheduler.preemption.counts == {SWAP: 0, RECOMPUTE: 1}
    w.drain()


def test_where_copies_are_measured_cheaper_it_is_swapped(world: Worlds) -> None:
    w, host, young = two_that_do_not_fit(world)
    costs = host.costs
    costs.observe_swap(2000, 0.99 * costs.prefill_seconds(3))
    step_until_preempted(w, young)
    assert host.num_used > 0
    assert w.scheduler.preemption.counts == {SWAP: 1, RECOMPUTE: 0}
    w.drain()


def test_what_the_prefix_cache_is_known_to_keep_speaks_for_recomputation(world: Worlds) -> None:
    w, host, _ = two_that_do_not_fit(world)
    costs = host.costs
    costs.observe_swap(2000, 0.9 * costs.prefill_seconds(3))
    for number in range(30):  # each comes back at once, when the older one has left
        young = w.submitted[-1]
        step_until_preempted(w, young)
        w.scheduler.remove(w.submitted[-2])
        w.drain()
        if w.scheduler.preemption.counts[RECOMPUTE]:
            break
        w.submit(range(100 * number, 100 * number + 10), max_tokens=14)
        w.submit(range(100 * number + 50, 100 * number + 61), max_tokens=9)
    counts = w.scheduler.preemption.counts
    assert counts[SWAP] >= 1, "the first was to be swapped"
    assert counts[RECOMPUTE] == 1, "the cache kept most of it, again and again"
    assert host.num_used == 0


def test_blocks_that_others_use_are_not_copied(world: Worlds) -> None:
    w, host = swapping_world(world, num_pages=10, block_size=3)
    w.submit(range(9), max_tokens=20)
    w.step()
    young = w.submit([*range(9), 50, 51, 52, 53], max_tokens=16)
    step_until_preempted(w, young)
    assert host.num_used == 7 - 3
    assert step_until_running(w, young) == 1
    w.drain()


def test_when_blocks_that_others_used_are_gone_all_is_computed_again(world: Worlds) -> None:
    w, host = swapping_world(world, num_pages=10, block_size=3)
    old = w.submit(range(9), max_tokens=20)
    w.step()
    young = w.submit([*range(9), 50, 51, 52, 53], max_tokens=16)
    step_until_preempted(w, young)
    assert host.num_used > 0
    w.scheduler.remove(old)
    pages = w.pool.allocate(w.pool.num_available)  # everything idle leaves
    w.pool.free(pages)
    known = young.num_known
    assert step_until_running(w, young) == known
    assert host.num_used == 0
    assert host.num_restored == 0
    w.drain()


def test_virtual_tokens_in_the_first_page_come_back_with_it(world: Worlds) -> None:
    w, host = swapping_world(
        world,
        num_pages=14,
        block_size=4,
        prefix_caching=False,
        adapters={"p": 1},
        traits={"p": AdapterTraits(num_prefix_tokens=6)},
    )
    w.submit(range(10), max_tokens=28)
    young = w.submit(range(20, 31), "p", max_tokens=16)
    w.step()
    w.host.finish()
    step_until_preempted(w, young)
    assert host.num_used == -(-(2 + young.num_known - 1) // 4)
    assert step_until_running(w, young) == 1
    w.drain()


def test_a_prefill_that_was_cut_short_goes_on(world: Worlds) -> None:
    w, host = swapping_world(
        world, num_pages=10, block_size=2, max_batch_tokens=4, prefix_caching=False, lag=1
    )
    w.submit(range(4), max_tokens=16)
    young = w.submit(range(20, 33), max_tokens=3)
    step_until_preempted(w, young)
    saved = 2 * host.num_used
    assert 0 < saved < young.num_prompt_tokens
    while not young.num_computed:
        w.step()
    assert host.num_restored * 2 == saved
    w.drain()


def test_what_another_has_computed_beyond_the_saved_tokens_is_not_computed_again(
    world: Worlds,
) -> None:
    w, host = swapping_world(
        world, num_pages=8, block_size=2, max_batch_tokens=4, policy="priority"
    )
    young = w.submit(range(20, 35))
    while young.num_computed < 6:
        w.step()
    w.scheduler._preempt(young)
    assert host.num_used > 0
    w.submit(range(20, 35), priority=-1)
    assert step_until_running(w, young) == 1
    assert (host.num_used, host.num_restored) == (0, 0)
    w.drain()


def test_pages_for_the_step_at_hand_are_not_copied(world: Worlds) -> None:
    w, host = swapping_world(world, num_pages=12, block_size=2)
    sequence = w.submit(range(5), max_tokens=8)
    w.step()
    w.kv.grow(sequence, 9)
    assert len(sequence.block_table) == 5
    w.scheduler._preempt(sequence)
    assert host.num_used == 3
    assert step_until_running(w, sequence) == 1
    w.drain()


def test_of_a_sequence_that_computed_nothing_nothing_is_copied(world: Worlds) -> None:
    w, host = swapping_world(
        world,
        num_pages=12,
        block_size=4,
        adapters={"p": 1},
        traits={"p": AdapterTraits(num_prefix_tokens=6)},
    )
    sequence = w.submit(range(5), "p", max_tokens=8)
    w.step()
    w.host.finish()
    w.scheduler.schedule()  # it is admitted, and no step is launched
    assert sequence.block_table
    w.scheduler._preempt(sequence)
    assert host.num_used == 0
    assert w.scheduler.preemption.counts == {SWAP: 0, RECOMPUTE: 1}
    w.drain()


def test_a_sequence_that_leaves_while_it_is_swapped_gives_its_host_pages_back(
    world: Worlds,
) -> None:
    w, host, young = two_that_do_not_fit(world)
    step_until_preempted(w, young)
    assert host.num_used > 0
    w.scheduler.remove(young)
    assert host.num_used == 0
    assert w.stats().host_kv_bytes == 0
    w.drain()


def test_a_swapped_sequence_whose_adapter_cannot_be_read_again_gives_its_host_pages_back(
    world: Worlds,
) -> None:
    w, host = swapping_world(world, num_pages=11, block_size=3, adapters={"a": 2})
    w.submit(range(10), max_tokens=14)
    young = w.submit(range(20, 31), "a", max_tokens=9)
    w.step()
    w.host.finish()
    step_until_preempted(w, young)
    assert host.num_used > 0
    w.evict("a")
    w.step()
    w.host.fail("a", "the disk is gone")
    w.step()
    assert w.failed[young] == "the disk is gone"
    assert host.num_used == 0
    w.drain()


def test_a_version_that_was_deleted_meanwhile_does_not_take_what_was_saved(world: Worlds) -> None:
    w, host = swapping_world(world, num_pages=11, block_size=3, adapters={"a": 2})
    w.submit(range(10), max_tokens=14)
    young = w.submit(range(20, 31), "a", max_tokens=9)
    w.step()
    w.host.finish()
    step_until_preempted(w, young)
    w.forget("a")
    w.step()
    w.host.finish()
    assert step_until_running(w, young) == 1
    assert host.num_used == 0
    w.drain()


class SwappingHistory(RuleBasedStateMachine):
    """Sequences that come and go in a pool that is too small, beside host RAM that is too, with
    copies that are now cheap and now dear."""

    worlds: Worlds

    @initialize(
        num_pages=st.integers(6, 20),
        block_size=st.integers(1, 4),
        host_pages=st.sampled_from([1, 4, 9, 100]),
        max_batch_tokens=st.integers(1, 20),
        max_batch_size=st.integers(2, 5),
        prefix_caching=st.booleans(),
        virtual=st.integers(1, 9),
        max_positions=st.integers(12, 40),
        lag=st.integers(0, 1),
        policy=st.sampled_from(["fair", "fcfs", "priority"]),
        adapter_share=st.sampled_from([None, None, 0.5]),
    )
    def start(self, virtual: int, **limits: Any) -> None:
        traits = {
            "prefix": AdapterTraits(virtual),
            "activated": AdapterTraits(virtual // 2, invocation=(1,)),
        }
        adapters = {"a": 2, "b": 1, "prefix": 0, "activated": 1}
        self.w, self.host = swapping_world(self.worlds, adapters=adapters, traits=traits, **limits)
        self.gone: list[Sequence] = []

    @rule(
        adapter=st.sampled_from([None, "a", "b", "a+b", "prefix", "activated"]),
        shared=st.integers(0, 12),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=9),
        max_tokens=st.integers(1, 12),
        priority=st.sampled_from([0, 0, -2, 5]),
    )
    def submit(
        self, adapter: str | None, shared: int, own: list[int], max_tokens: int, priority: int
    ) -> None:
        self.w.submit([*range(10, 10 + shared), *own], adapter, max_tokens, priority=priority)

    @rule(times=st.integers(1, 6), loads=st.booleans())
    def step(self, times: int, loads: bool) -> None:
        for _ in range(times):
            self.w.step()
        if loads:
            self.w.host.finish()

    @rule(pages_for_a_token=st.sampled_from([0.0, 0.01, 0.3, 1.0, 9.0]))
    def measure(self, pages_for_a_token: float) -> None:
        seconds = self.host.costs.prefill_seconds(1) * pages_for_a_token
        self.host.costs.observe_swap(FakeHostKV.page_bytes, seconds)

    @precondition(lambda self: self.w.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.w.live, key=lambda s: int(s.id))), "whom")
        self.w.scheduler.remove(sequence)
        self.gone.append(sequence)

    @precondition(lambda self: self.w.host.pending)
    @rule()
    def fail_loads(self) -> None:
        self.w.host.fail(None, "the load failed")

    @rule(adapter=st.sampled_from(["a", "b", "prefix", "activated"]))
    def delete(self, adapter: str) -> None:
        self.w.forget(adapter)

    @invariant()
    def only_those_who_wait_have_host_pages(self) -> None:
        if hasattr(self, "w"):
            self.w.check()
            left = self.w.scheduler.preemption._left
            assert set(left) <= set(self.w.scheduler.waiting)
            assert all(sequence.num_preemptions for sequence in left)
            assert self.host.num_used == sum(len(one.saved or ()) for one in left.values())

    def teardown(self) -> None:
        if not hasattr(self, "w"):
            return
        self.w.drain()
        assert self.host.num_used == 0
        assert sum(self.w.scheduler.preemption.counts.values()) == self.w.scheduler.num_preemptions
        ends = [*self.w.finished, *self.w.failed, *self.gone]
        assert len(ends) == len(self.w.submitted)
        assert set(ends) == set(self.w.submitted)


def test_random_histories_with_swapping_keep_every_promise(world: Worlds) -> None:
    class History(SwappingHistory):
        worlds = world

    run_state_machine_as_test(
        History, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
