"""The books of the pool: no page lost, none owned twice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from polydelta.engine.eviction import EvictionReason
from polydelta.engine.pool import PageAllocator, PagePool


def runs(pages: set[int]) -> list[int]:
    """Lengths of the runs of consecutive pages, longest first."""
    lengths: list[int] = []
    for page in sorted(pages):
        if page - 1 in pages:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return sorted(lengths, reverse=True)


class AllocatorHistory(RuleBasedStateMachine):
    """An allocator against a set of free pages."""

    @initialize(num_pages=st.integers(0, 40))
    def start(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.free = set(range(num_pages))
        self.held: list[list[int]] = []

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.free)), "count")
        pages = self.allocator.take(count)
        assert pages == sorted(self.free)[:count]
        self._keep(pages)

    @rule(data=st.data())
    def take_run(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.free)), "count")
        lengths = runs(self.free)
        pages = self.allocator.take_run(count)
        assert len(pages) == len(set(pages)) == count
        assert set(pages) <= self.free
        fewest = next(n for n in range(len(lengths) + 1) if sum(lengths[:n]) >= count)
        pieces = sum(after != before + 1 for before, after in itertools.pairwise(pages))
        assert pieces + bool(pages) == fewest
        if fewest == 1:
            tightest = min(length for length in lengths if length >= count)
            lengths.remove(tightest)
            lengths += [tightest - count] if tightest > count else []
            assert runs(self.free - set(pages)) == sorted(lengths, reverse=True)
        self._keep(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """All pages of one history entry, or some, in any order."""
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1), "whose"))
        shuffled = data.draw(st.permutations(held), "order")
        cut = data.draw(st.integers(0, len(held)), "cut")
        self.allocator.give_back(shuffled[:cut])
        self.free |= set(shuffled[:cut])
        self._keep(shuffled[cut:])

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def give_back_twice(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.free)), "page")
        with pytest.raises(ValueError, match=f"page {page} is not in use"):
            self.allocator.give_back([page])

    @invariant()
    def counts_are_right(self) -> None:
        if not hasattr(self, "allocator"):
            return
        assert self.allocator.num_free == len(self.free)
        for page in range(self.allocator.num_pages):
            assert self.allocator.is_free(page) == (page in self.free)

    def _keep(self, pages: list[int]) -> None:
        self.free -= set(pages)
        if pages:
            self.held.append(pages)


def test_random_histories_lose_no_page_and_own_none_twice() -> None:
    run_state_machine_as_test(
        AllocatorHistory, settings=settings(max_examples=120, stateful_step_count=40, deadline=None)
    )


def test_a_page_that_never_existed_cannot_be_given_back() -> None:
    allocator = PageAllocator(3)
    allocator.take(3)
    for page in (-1, 3):
        with pytest.raises(ValueError, match=f"page {page} is not in use"):
            allocator.give_back([page])


def test_a_refused_page_leaves_the_count_right() -> None:
    allocator = PageAllocator(4)
    allocator.take(3)
    with pytest.raises(ValueError, match="page 1 is not in use"):
        allocator.give_back([1, 1])
    assert allocator.num_free == 2
    assert sum(map(allocator.is_free, range(4))) == 2


def test_memory_does_not_grow_while_the_same_page_comes_and_goes() -> None:
    allocator = PageAllocator(100)
    for _ in range(5000):
        allocator.give_back(allocator.take(1))
        allocator.give_back(allocator.take_run(7))
    assert len(allocator._lowest) < 500


def test_single_pages_come_from_the_low_end_and_runs_from_the_high_end() -> None:
    allocator = PageAllocator(10)
    assert allocator.take(2) == [0, 1]
    assert allocator.take_run(3) == [7, 8, 9]
    assert allocator.take(1) == [2]


def test_a_run_is_taken_from_the_tightest_place() -> None:
    allocator = PageAllocator(12)
    allocator.take(12)
    allocator.give_back([0, 1, 2, 3, 5, 6, 8, 9, 10])
    assert allocator.take_run(2) == [5, 6]
    assert allocator.take_run(3) == [8, 9, 10]


def test_pieces_are_joined_across_where_they_were_cut() -> None:
    allocator = PageAllocator(6)
    pages = allocator.take(6)
    for page in (pages[3], pages[1], pages[5], pages[0], pages[2], pages[4]):
        allocator.give_back([page])
    assert allocator.take_run(6) == pages


class PoolHistory(RuleBasedStateMachine):
    """A pool with tenants that retire, revive and are evicted."""

    @initialize(num_pages=st.integers(1, 30))
    def start(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.in_use: dict[int, list[int]] = {}
        self.idle: dict[int, list[int]] = {}
        self.forgotten: set[int] = set()
        self.next_key = 0

    @rule(data=st.data(), in_pieces=st.booleans())
    def allocate(self, data: st.DataObject, in_pieces: bool) -> None:
        count = data.draw(st.integers(1, self.pool.num_pages + 2), "count")
        if not self.pool.can_allocate(count):
            in_use = sum(map(len, self.in_use.values()))
            assert count > self.pool.num_pages - in_use
            return
        enough = self.pool.num_free >= count
        before = set(self.idle)
        pages = self.pool.allocate(count) if in_pieces else self.pool.allocate_run(count)
        assert len(set(pages)) == count
        assert not enough or set(self.idle) == before, "evicted without need"
        self.in_use[self.next_key] = pages
        self.next_key += 1

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.in_use.pop(data.draw(st.sampled_from(sorted(self.in_use)), "key")))

    @precondition(lambda self: self.in_use)
    @rule(data=st.data(), cost=st.floats(0, 10), uses=st.integers(0, 5))
    def retire(self, data: st.DataObject, cost: float, uses: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.in_use)), "key")
        pages = self.idle[key] = self.in_use.pop(key)
        self.pool.retire(key, pages, cost, uses, lambda _: self._forget(key))

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.idle)), "key")
        pages = self.idle.pop(key)
        assert list(self.pool.revive(key)) == pages
        self.in_use[key] = pages

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.idle)), "key")
        free = self.pool.num_free + len(self.idle[key])
        self.pool.evict(key, EvictionReason.ORDERED)
        assert key in self.forgotten
        assert self.pool.num_free == free

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        in_use = [page for pages in self.in_use.values() for page in pages]
        self.pool.check_integrity(in_use)
        assert self.pool.num_idle == sum(map(len, self.idle.values()))
        assert self.pool.num_available == self.pool.num_pages - len(in_use)
        assert self.pool.num_free == self.pool.num_available - self.pool.num_idle

    def _forget(self, key: int) -> None:
        assert key not in self.forgotten, "told twice"
        self.forgotten.add(key)
        del self.idle[key]


def test_tenants_that_retire_revive_and_are_evicted_keep_the_books_balanced() -> None:
    run_state_machine_as_test(
        PoolHistory, settings=settings(max_examples=120, stateful_step_count=40, deadline=None)
    )


def test_what_is_cheapest_to_have_back_leaves_first_whatever_it_is() -> None:
    pool = PagePool(6)
    gone: list[str] = []
    worth = {"a prefix": (1.0, 3), "an adapter": (8.0, 1), "another prefix": (1.0, 1)}
    for key, (cost, uses) in worth.items():
        pool.retire(key, pool.allocate(2), cost, uses, lambda _, key=key: gone.append(key))
    pool.allocate(1)
    assert gone == ["another prefix"]
    pool.allocate(5)
    assert gone == ["another prefix", "a prefix", "an adapter"]


def test_what_nobody_used_again_leaves_first_whatever_it_costs() -> None:
    """A prompt that nobody sends again costs more to have back than an adapter, but nobody will."""
    pool = PagePool(4)
    gone: list[str] = []
    pool.retire("an adapter", pool.allocate(2), 1.0, 5, lambda _: gone.append("an adapter"))
    pool.retire("a prompt", pool.allocate(2), 16.0, 0, lambda _: gone.append("a prompt"))
    pool.allocate(1)
    assert gone == ["a prompt"]


@given(st.sets(st.integers(0, 9)))
def test_books_that_do_not_balance_are_noticed(claimed: set[int]) -> None:
    pool = PagePool(10)
    taken = set(pool.allocate(4))
    if claimed == taken:
        pool.check_integrity(sorted(claimed))
    else:
        with pytest.raises(RuntimeError, match="do not balance"):
            pool.check_integrity(sorted(claimed))


def test_a_page_with_two_owners_is_noticed() -> None:
    pool = PagePool(2)
    page = pool.allocate(1)
    with pytest.raises(RuntimeError, match="do not balance"):
        pool.check_integrity(page + page)
