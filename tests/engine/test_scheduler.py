"""Who runs when, and who has to make room. Every `world.step` also checks the pool's books, the
limits, and that each sequence reads its own KV (see `conftest.py`)."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future
from contextlib import suppress
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

from polydelta.adapters_store.errors import InUseError
from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.adapter_entry import ResidencyState
from polydelta.engine.eviction import EvictionReason
from polydelta.engine.prefetching import MAX_PREFETCHED
from polydelta.engine.sequence import Schedule, Sequence

# The class `World` of conftest.py.
Worlds = Any


def shares(schedule: Schedule) -> dict[Sequence, int]:
    return {scheduled.sequence: scheduled.num_tokens for scheduled in schedule}


def test_a_step_of_the_scheduler_needs_no_torch() -> None:
    code = "import sys, polydelta.engine.scheduler as s; print('torch' in sys.modules, s.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "polydelta.engine.scheduler"]


def test_a_prompt_that_fits_is_prefilled_at_once_and_then_decoded(world: Worlds) -> None:
    w = world()
    sequence = w.submit(range(10), max_tokens=3)
    assert shares(w.step()) == {sequence: 10}
    assert shares(w.step()) == {sequence: 1}
    assert shares(w.step()) == {sequence: 1}
    assert w.finished == [sequence]
    assert sequence.num_output_tokens == 3
    assert w.step() == []


def test_decodes_come_before_prefill(world: Worlds) -> None:
    w = world(max_batch_tokens=4)
    long = w.submit(range(11), max_tokens=2)
    w.step()  # 4 of 11
    short = w.submit([1], max_tokens=9)
    w.step()  # 8 of 11: the budget is spent
    w.step()  # 11 of 11, and the short one's only token
    assert shares(w.step()) == {long: 1, short: 1}
    late = w.submit(range(20, 30), max_tokens=2)
    assert [(s.sequence, s.num_tokens) for s in w.step()] == [(short, 1), (late, 3)]
    assert [(s.sequence, s.num_tokens) for s in w.step()] == [(short, 1), (late, 3)]


def test_long_prompts_are_cut_into_chunks_under_the_token_budget(world: Worlds) -> None:
    w = world(max_batch_tokens=6)
    sequence = w.submit(range(15), max_tokens=1)
    assert [shares(w.step())[sequence] for _ in range(3)] == [6, 6, 3]
    assert w.finished == [sequence]


def test_only_the_last_chunk_samples(world: Worlds) -> None:
    w = world(max_batch_tokens=6)
    sequence = w.submit(range(15), max_tokens=2)
    outputs = []
    for _ in range(3):
        w.step()
        outputs.append(sequence.num_output_tokens)
    assert outputs == [0, 0, 1]


def test_the_budget_left_by_one_goes_to_the_next(world: Worlds) -> None:
    w = world(max_batch_tokens=10)
    one, two, three = (w.submit(range(s, s + 7), max_tokens=1) for s in (0, 10, 20))
    assert shares(w.step()) == {one: 7, two: 3}
    assert shares(w.step()) == {two: 4, three: 6}


def test_no_more_sequences_run_than_the_limit(world: Worlds) -> None:
    w = world(max_batch_size=2)
    sequences = [w.submit([n], max_tokens=2) for n in range(3)]
    assert list(shares(w.step())) == sequences[:2]
    assert list(shares(w.step())) == sequences[:2]
    assert list(shares(w.step())) == sequences[2:]


def test_requests_enter_in_the_order_of_arrival(world: Worlds) -> None:
    """A small request does not overtake a large one that waits for room."""
    w = world(num_pages=5, block_size=4)
    running = w.submit(range(12), max_tokens=3)
    w.step()
    large, small = w.submit(range(20, 32), max_tokens=2), w.submit([99], max_tokens=2)
    w.step()
    assert list(w.scheduler.waiting) == [large, small]
    w.drain()
    assert w.finished == [running, large, small]


def test_out_of_pages_the_youngest_is_preempted(world: Worlds) -> None:
    w = world(num_pages=4, block_size=4)
    old, young = w.submit(range(7), max_tokens=6), w.submit(range(20, 27), max_tokens=6)
    w.step()
    assert w.scheduler.running == [old, young]
    w.step()
    w.step()  # both need a third page
    assert w.scheduler.running == [old]
    assert list(w.scheduler.waiting) == [young]
    assert (young.num_preemptions, old.num_preemptions) == (1, 0)
    assert w.scheduler.num_preemptions == 1
    w.drain()
    assert w.finished == [old, young]


def test_preemption_gives_back_the_budget_of_its_victim(world: Worlds) -> None:
    w = world(num_pages=4, block_size=4, max_batch_tokens=9, prefix_caching=False)
    old = w.submit(range(13), max_tokens=3)
    w.step()  # 9 of 13, three pages
    young = w.submit([50], max_tokens=8)
    w.step()  # 13 of 13 needs the fourth page
    assert young in w.scheduler.waiting
    assert old.num_computed == 13
    w.drain()
    assert w.finished == [old, young]


def test_a_preempted_sequence_gives_back_its_share_of_the_step_at_hand(world: Worlds) -> None:
    w = world(num_pages=4, block_size=4, max_batch_tokens=6)
    short = w.submit(range(3), max_tokens=9)
    w.step()
    long = w.submit(range(20, 32), max_tokens=3)
    w.step()
    # As if another policy had let the long one in first: it still prefills, after the decode.
    w.scheduler.running.reverse()
    assert shares(w.step()) == {long: 5}
    assert list(w.scheduler.waiting) == [short]
    w.drain()
    assert w.finished == [long, short]


def test_pages_of_the_idle_adapter_that_a_request_needs_are_no_room_for_its_kv(
    world: Worlds,
) -> None:
    w = world(num_pages=6, block_size=4, adapters={"a": 3})
    w.submit([1], "a")
    w.drain()
    running = w.submit(range(8), max_tokens=4)
    w.step()
    waiting = w.submit(range(20, 31), "a", max_tokens=1)
    assert w.pool.num_available >= w.kv.pages_for(waiting, waiting.num_tokens)
    assert shares(w.step()) == {running: 1}
    assert list(w.scheduler.waiting) == [waiting]


def test_the_preempted_enter_again_before_those_who_never_ran(world: Worlds) -> None:
    w = world(num_pages=4, block_size=4)
    old, young = w.submit(range(7), max_tokens=6), w.submit(range(20, 27), max_tokens=6)
    w.step()
    late = w.submit(range(40, 47), max_tokens=1)
    w.step()
    w.step()
    assert list(w.scheduler.waiting) == [young, late]
    w.drain()
    assert w.finished == [old, young, late]


def test_recomputation_continues_from_the_prefix_cache(world: Worlds) -> None:
    w = world(num_pages=4, block_size=4)
    old, young = w.submit(range(8), max_tokens=2), w.submit(range(20, 27), max_tokens=6)
    w.step()
    w.step()  # the old one's ninth token takes the page; the young one's two are full or go
    assert young.num_preemptions == 1
    assert w.finished == [old]
    # The first block was full and nobody needed its page.
    assert shares(w.step()) == {young: young.num_prompt_tokens + 1 - 4}
    w.drain()
    assert young.num_output_tokens == 6
    assert young.num_cached == 0


def test_recomputed_sequences_say_the_same_as_undisturbed_ones(world: Worlds) -> None:
    prompts = [range(start, start + 7) for start in (0, 20, 40)]
    crowded, roomy = world(num_pages=5), world(num_pages=50)
    for w in (crowded, roomy):
        for prompt in prompts:
            w.submit(prompt, max_tokens=10)
        w.drain()
    assert crowded.scheduler.num_preemptions > 0
    assert roomy.scheduler.num_preemptions == 0
    assert [s.token_ids for s in crowded.submitted] == [s.token_ids for s in roomy.submitted]


def test_a_shared_prefix_is_computed_once(world: Worlds) -> None:
    w = world()
    w.submit([*range(8), 30], max_tokens=1)
    w.drain()
    second = w.submit([*range(8), 40, 41], max_tokens=1)
    assert shares(w.step()) == {second: 2}
    assert second.num_cached == 8


def test_a_waiting_adapter_does_not_hold_up_others_behind_it(world: Worlds) -> None:
    w = world(adapters={"slow": 2, "quick": 1})
    slow = w.submit([1, 2], "slow")
    quick, base = w.submit([3, 4], "quick"), w.submit([5, 6])
    assert list(shares(w.step())) == [base]
    w.host.finish("quick")
    assert list(shares(w.step())) == [quick]
    assert w.step() == []
    w.host.finish("slow")
    assert list(shares(w.step())) == [slow]


def test_many_requests_for_an_adapter_load_it_once(world: Worlds) -> None:
    w = world(adapters={"a": 2})
    sequences = [w.submit([n, n], "a", max_tokens=2) for n in range(5)]
    w.step()
    w.step()
    w.host.finish()
    assert set(shares(w.step())) == set(sequences)
    w.drain()
    w.submit([9, 9], "a")
    w.drain()
    assert w.host.asked == ["a"]
    assert w.stats().adapter_loads == 1


def test_a_failed_load_fails_all_who_wait_for_it_and_nobody_else(world: Worlds) -> None:
    w = world(adapters={"broken": 1, "sound": 1})
    doomed = [w.submit([n], "broken") for n in range(3)]
    others = [w.submit([7], "sound"), w.submit([8])]
    w.step()
    w.host.fail("broken", "the file is cut short")
    w.host.finish("sound")
    w.step()
    assert w.failed == dict.fromkeys(doomed, "the file is cut short")
    assert set(w.finished) == set(others)
    assert w.live == []


def test_a_sum_whose_loads_fail_before_the_same_step_fails_its_own_request_only(
    world: Worlds,
) -> None:
    w = world(adapters={"a": 1, "b": 1, "sound": 1})
    doomed = w.submit([1], "a+b")
    others = [w.submit([2], "sound"), w.submit([3])]
    w.step()
    w.host.fail("a", "no")
    w.host.fail("b", "no")
    w.host.finish("sound")
    w.step()
    assert w.failed == {doomed: "no"}
    assert set(w.finished) == set(others)
    again = w.submit([4], "b")
    w.drain()
    assert w.finished[-1] is again
    assert w.host.asked == ["a", "b", "sound", "b"]


def test_a_sequence_behind_ones_that_fail_runs_without_anybody_waking_the_loop(
    world: Worlds,
) -> None:
    """Its adapter is not looked at before they have left, so that no load would wake the loop."""
    w = world(max_batch_size=1, num_pages=4, adapters={"a": 1})
    # Of different priorities, they stand for as many queues as are looked at.
    too_large = [w.submit(range(40), priority=number) for number in range(MAX_PREFETCHED + 1)]
    behind = w.submit([1], "a")
    assert w.step() == []
    assert list(w.failed) == too_large
    assert w.host.pending == []
    w.drain()
    assert w.finished == [behind]


def test_the_next_request_after_a_failed_load_tries_again(world: Worlds) -> None:
    w = world(adapters={"a": 1})
    w.submit([1], "a")
    w.step()
    w.host.fail("a", "no such file")
    w.step()
    again = w.submit([1], "a")
    w.drain()
    assert w.finished == [again]
    assert w.host.asked == ["a", "a"]


@pytest.mark.parametrize("doomed", [2, 3, 5])
def test_those_who_fail_do_not_put_those_behind_them_to_sleep(world: Worlds, doomed: int) -> None:
    """With as many failures as places in a batch, the next in line still runs in this step."""
    w = world(max_batch_size=2, num_pages=4, adapters={"broken": 1})
    for n in range(doomed):
        w.submit(range(n, n + 40))
    too_large_then_sound = w.submit([1])
    assert list(shares(w.step())) == [too_large_then_sound]
    for n in range(doomed):
        w.submit([n], "broken")
    w.step()
    w.host.fail("broken", "no")
    broken_then_sound = w.submit([2])
    assert list(shares(w.step())) == [broken_then_sound]
    assert len(w.failed) == 2 * doomed


def test_a_request_too_large_for_the_pool_is_refused_with_both_numbers(world: Worlds) -> None:
    w = world(num_pages=6, block_size=4, adapters={"a": 3})
    fits = w.submit(range(12), max_tokens=12)
    too_long = w.submit(range(12), max_tokens=13)
    w.step()
    assert list(w.failed) == [too_long]
    assert "needs 7 pages" in w.failed[too_long]
    assert "the pool has 6" in w.failed[too_long]
    beside_its_adapter = w.submit(range(12), "a", max_tokens=1)
    w.drain()
    assert "needs 7 pages of the pool (3 of them for its adapters)" in w.failed[beside_its_adapter]
    assert w.finished == [fits]


def test_the_largest_request_that_fits_beside_its_adapter_runs(world: Worlds) -> None:
    w = world(num_pages=6, block_size=4, adapters={"a": 3, "b": 3})
    others = [w.submit(range(8), "b", max_tokens=4) for _ in range(2)]
    largest = w.submit(range(8), "a", max_tokens=4)
    w.drain()
    assert set(w.finished) == {largest, *others}


def test_a_request_that_a_pin_took_the_last_page_from_is_told_so(world: Worlds) -> None:
    """Alone and preempted: nobody else would wake the loop."""
    w = world(num_pages=6, block_size=2, prefix_caching=False, adapters={"a": 1})
    sequence = w.submit(range(9), max_tokens=3)
    w.load("a", pin=True)
    w.step()
    w.host.finish()
    w.drain()
    assert "1 of which pinned adapters hold" in w.failed[sequence]


def test_idle_adapters_are_evicted_to_make_room_for_kv(world: Worlds) -> None:
    w = world(num_pages=6, block_size=4, adapters={"a": 4})
    w.submit([1, 2], "a")
    w.drain()
    assert len(w.residency.resident()) == 1
    w.submit(range(20), max_tokens=1)
    w.drain()
    assert w.residency.resident() == []
    assert w.stats().adapter_evictions == 1


def test_cached_prefixes_are_evicted_to_make_room_for_an_adapter(world: Worlds) -> None:
    w = world(num_pages=6, block_size=4, adapters={"a": 5})
    w.submit(range(20), max_tokens=1)
    w.drain()
    assert w.pool.num_idle == 5
    one = w.submit([1, 2], "a")
    w.drain()
    assert w.finished[-1] is one
    assert w.pool.num_idle <= 6


def test_an_evicted_adapter_is_loaded_again_when_it_is_asked_for(world: Worlds) -> None:
    w = world(num_pages=4, adapters={"a": 3, "b": 3})
    for name in ("a", "b", "a"):
        w.submit([1, 2], name)
        w.drain()
    assert w.host.asked == ["a", "b", "a"]
    assert len(w.finished) == 3


def test_the_adapter_of_a_preempted_sequence_may_leave_and_comes_back(world: Worlds) -> None:
    w = world(num_pages=6, block_size=4, adapters={"a": 2})
    old = w.submit(range(8), max_tokens=14)
    young = w.submit([1, 2], "a", max_tokens=12)
    w.step()
    w.host.finish()
    w.drain()
    assert set(w.finished) == {old, young}
    assert young.num_preemptions > 0
    assert w.stats().adapter_evictions > 0
    assert young.num_output_tokens == 12


def test_an_aborted_waiting_request_lets_its_loaded_adapter_go(world: Worlds) -> None:
    w = world(num_pages=4, adapters={"a": 2})
    w.submit(range(12), max_tokens=4)
    w.step()
    one, two = w.submit([1, 2], "a"), w.submit([3, 4], "a")
    w.step()
    w.host.finish()
    w.step()
    assert w.residency.state(one.adapter_refs[0]) is ResidencyState.ON_HOST
    w.scheduler.remove(one)
    assert w.residency.state(one.adapter_refs[0]) is ResidencyState.ON_HOST
    w.scheduler.remove(two)
    assert w.residency.state(two.adapter_refs[0]) is ResidencyState.ON_DISK


def test_a_refused_request_lets_its_loaded_adapter_go(world: Worlds) -> None:
    w = world(num_pages=4, adapters={"a": 2})
    refused = w.submit(range(12), "a", max_tokens=4)
    w.drain()
    assert list(w.failed) == [refused]
    assert w.residency.state(refused.adapter_refs[0]) is ResidencyState.ON_DISK


def test_an_aborted_running_request_gives_everything_back(world: Worlds) -> None:
    w = world(adapters={"a": 2}, prefix_caching=False)
    sequence = w.submit(range(9), "a", max_tokens=5)
    w.step()
    w.host.finish()
    w.step()
    assert w.pool.num_available == 16 - 2 - 3
    w.scheduler.remove(sequence)
    w.check()
    assert w.pool.num_available == 16
    assert w.live == []


def test_an_abort_does_not_touch_the_pages_that_others_share(world: Worlds) -> None:
    w = world()
    first = w.submit(range(9), max_tokens=5)
    w.step()
    second = w.submit(range(9), max_tokens=5)
    w.step()
    assert first.block_table[:2] == second.block_table[:2]
    w.scheduler.remove(first)
    w.drain()
    assert w.finished == [second]


def test_prefix_blocks_are_never_given_to_another_adapter_or_the_base(world: Worlds) -> None:
    w = world(num_pages=40, adapters={"a": 1, "b": 1})
    prompt = range(9)
    for name in ("a", None, "b", "a", None, "b"):
        w.submit(prompt, name)
        w.drain()
    assert [s.num_cached for s in w.submitted] == [0, 0, 0, 8, 8, 8]


def test_adapters_of_one_digest_share_no_prefix_blocks_as_not_everybody_may_use_both(
    world: Worlds,
) -> None:
    w = world(adapters={"a": 1, "copy of a": 1}, digests={"a": "d", "copy of a": "d"})
    for name in ("a", "copy of a"):
        w.submit(range(9), name)
        w.drain()
    assert [s.num_cached for s in w.submitted] == [0, 0]


def test_requests_of_different_salts_share_no_prefix_blocks(world: Worlds) -> None:
    w = world(num_pages=40, adapters={"a": 1})
    for salt in ("", "pepper", "", "pepper"):
        for name in ("a", None):
            w.submit(range(9), name, cache_salt=salt)
            w.drain()
    assert [s.num_cached for s in w.submitted] == [0, 0, 0, 0, 8, 8, 8, 8]


def test_a_prefix_outlives_the_adapter_that_made_it(world: Worlds) -> None:
    """The digest names it, not the copy of the adapter in the pool."""
    w = world(num_pages=7, block_size=4, adapters={"a": 4})
    for _ in range(4):
        w.submit(range(5), "a")
        w.drain()
    adapter = w.submitted[0].adapter_refs[0]
    w.pool.evict(adapter, EvictionReason.ROOM)
    assert w.residency.state(adapter) is ResidencyState.ON_DISK
    again = w.submit(range(5), "a")
    w.drain()
    assert again.num_cached == 4


# One with ready-made KV before the sequence, two activated ones, and one that is both.
WITH_TRAITS = ("prefix", "activated", "rarely activated", "both")


class SchedulerHistory(RuleBasedStateMachine):
    """Everything that can happen to a scheduler, in any order, in a pool that is too small."""

    worlds: Worlds

    @initialize(
        num_pages=st.integers(6, 24),
        block_size=st.integers(1, 4),
        max_batch_tokens=st.integers(1, 20),
        max_batch_size=st.integers(1, 5),
        prefix_caching=st.booleans(),
        sizes=st.lists(st.integers(1, 7), min_size=4, max_size=4),
        small_sizes=st.lists(st.integers(0, 2), min_size=4, max_size=4),
        virtual=st.integers(1, 9),
        max_positions=st.integers(12, 40),
        lag=st.integers(0, 1),
        policy=st.sampled_from(["fair", "fcfs", "priority"]),
        adapter_share=st.sampled_from([None, None, 0.5]),
        host_kv_pages=st.sampled_from([0, 0, 3, 50]),
    )
    def start(self, sizes: list[int], small_sizes: list[int], virtual: int, **limits: Any) -> None:
        adapters = dict(zip(("a", "b", "c", "copy of a"), sizes, strict=True))
        adapters |= dict(zip(WITH_TRAITS, small_sizes, strict=True))
        traits = dict(
            zip(
                WITH_TRAITS,
                (
                    AdapterTraits(virtual),
                    AdapterTraits(invocation=(1,)),
                    AdapterTraits(invocation=(2, 0, 2)),
                    AdapterTraits(virtual, invocation=(1, 1)),
                ),
                strict=True,
            )
        )
        digests = {"copy of a": "digest of a"}
        self.w = self.worlds(adapters=adapters, digests=digests, traits=traits, **limits)
        self.broken: set[str] = set()
        self.aborted: list[Sequence] = []
        self.orders: list[Future[None]] = []

    @rule(
        adapter=st.sampled_from(
            [None, "a", "b", "c", "copy of a", "a+b", "b+c+copy of a", *WITH_TRAITS]
        ),
        shared=st.integers(0, 12),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=9),
        max_tokens=st.integers(1, 9),
        tenant=st.sampled_from(["", "x", "y"]),
        priority=st.sampled_from([0, 0, -2, 5]),
        cache_salt=st.sampled_from(["", "", "salt"]),
    )
    def submit(
        self,
        adapter: str | None,
        shared: int,
        own: list[int],
        max_tokens: int,
        tenant: str,
        priority: int,
        cache_salt: str,
    ) -> None:
        weight = {"": 1.0, "x": 0.5, "y": 3.0}[tenant]
        prompt = [*range(10, 10 + shared), *own]
        self.w.submit(prompt, adapter, max_tokens, tenant, weight, priority, cache_salt)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.w.step()

    @precondition(lambda self: self.w.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = self.w.live[data.draw(st.integers(0, len(self.w.live) - 1), "whom")]
        self.w.scheduler.remove(sequence)
        self.aborted.append(sequence)

    @precondition(lambda self: self.w.host.pending)
    @rule(data=st.data())
    def finish_load(self, data: st.DataObject) -> None:
        ids = sorted({ref.id for ref, _ in self.w.host.pending})
        self.w.host.finish(data.draw(st.sampled_from(ids), "adapter"))

    @precondition(lambda self: self.w.host.pending)
    @rule(data=st.data())
    def fail_load(self, data: st.DataObject) -> None:
        ids = sorted({ref.id for ref, _ in self.w.host.pending})
        adapter = data.draw(st.sampled_from(ids), "adapter")
        self.broken.add(adapter)
        self.w.host.fail(adapter, "the load failed")

    @rule(adapter=st.sampled_from(["a", "b", "c", "prefix", "activated"]), pin=st.booleans())
    def order(self, adapter: str, pin: bool) -> None:
        self.orders.append(self.w.load(adapter, pin))

    @rule(adapter=st.sampled_from(["a", "b", "c", "prefix", "activated"]))
    def unpin(self, adapter: str) -> None:
        self.w.unpin(adapter)

    @rule(
        adapter=st.sampled_from(["a", "b", "c", "prefix", "activated", "both"]),
        gone=st.booleans(),
    )
    def take_out(self, adapter: str, gone: bool) -> None:
        with suppress(InUseError):
            self.w.forget(adapter) if gone else self.w.evict(adapter)

    @precondition(lambda self: self.orders)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        self.w.withdraw(self.orders[data.draw(st.integers(0, len(self.orders) - 1), "order")])

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "w"):
            self.w.check()
            for sequence, reason in self.w.failed.items():
                if reason == "the load failed":
                    assert {ref.id for ref in sequence.adapter_refs} & self.broken
                elif "context window" in reason:
                    tokens = sequence.num_prompt_tokens + self.w.num_virtual(sequence)
                    assert tokens >= self.w.limits.max_positions
                else:
                    assert self._is_too_large(sequence), "refused, though it would fit"

    def teardown(self) -> None:
        if not hasattr(self, "w"):
            return
        for adapter in ("a", "b", "c", "prefix", "activated"):
            self.w.unpin(adapter)
        self.w.drain()
        assert all(order.done() for order in self.orders)
        ends = [*self.w.finished, *self.w.failed, *self.aborted]
        assert len(ends) == len(self.w.submitted)
        assert set(ends) == set(self.w.submitted)
        assert self.w.kv.used_pages() == []
        assert self.w.residency.used_pages() == []
        assert self.w.host_kv.num_used == 0
        for pool in (self.w.pools.kv, self.w.pools.adapters):
            assert pool.num_available == pool.num_pages

    def _is_too_large(self, sequence: Sequence) -> bool:
        virtual, size = self.w.num_virtual(sequence), self.w.block_size
        pages = sum(self.w.host.sizes[ref.id] for ref in sequence.adapter_refs)
        pages = max(pages + -(-virtual // size), len(sequence.adapter_refs))
        tokens = sequence.num_prompt_tokens + sequence.request.sampling.max_tokens
        own_pages = -(-(virtual % size + tokens) // size)
        # What was pinned when it was refused is not known any more; it was half at most.
        pinned = self.w.pools.adapters.num_pages // 2
        return not self.w.pools.fit(own_pages, pages + pinned)


def test_random_histories_keep_every_promise_and_nobody_starves(world: Worlds) -> None:
    class History(SchedulerHistory):
        worlds = world

    run_state_machine_as_test(
        History, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
