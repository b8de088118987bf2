"""What leaves the pool against the paper's own words, and what never does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from polydelta.engine.pool import PagePool

Worlds = Callable[..., Any]


class PlainModel:
    """Greedy-dual-size-frequency as Cherkasova has it (HP Labs 1998): H = L + F * C / S; whoever
    has the least H leaves, and L becomes that. What is in use is not in it."""

    def __init__(self) -> None:
        self.clock = 0.0
        # (H, arrival) and size of each.
        self.idle: dict[int, tuple[tuple[float, int], int]] = {}

    def retire(self, key: int, size: int, cost: float, uses: int) -> None:
        self.idle[key] = ((self.clock + uses * cost / size, key), size)

    def make_room(self, missing: int) -> list[int]:
        """Who leaves, in turn, until so many pages more are free."""
        victims = []
        while missing > 0:
            victim = min(self.idle, key=lambda key: self.idle[key][0])
            (self.clock, _), size = self.idle.pop(victim)
            missing -= size
            victims.append(victim)
        return victims


class PoolHistory(RuleBasedStateMachine):
    """A pool beside the model; costs of a few values, so that there are ties."""

    @initialize(num_pages=st.integers(4, 40))
    def start(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.model = PlainModel()
        self.in_use: dict[int, list[int]] = {}
        self.gone: list[int] = []
        self.arrivals = 0

    @rule(data=st.data(), as_run=st.booleans())
    def allocate(self, data: st.DataObject, as_run: bool) -> None:
        most = self.pool.num_available
        if not most:
            return
        count = data.draw(st.integers(1, min(most, 9)), "count")
        expected = self.model.make_room(count - self.pool.num_free)
        self.gone.clear()
        pages = self.pool.allocate_run(count) if as_run else self.pool.allocate(count)
        assert self.gone == expected
        self._keep(pages)

    @precondition(lambda self: self.in_use)
    @rule(data=st.data(), cost=st.sampled_from([0.0, 1.0, 2.5, 40.0]), uses=st.integers(0, 6))
    def retire(self, data: st.DataObject, cost: float, uses: int) -> None:
        pages = self.in_use.pop(data.draw(st.sampled_from(sorted(self.in_use)), "whom"))
        # A new name, as an entry that retires again has come last.
        key = self._next()
        self.pool.retire(key, pages, cost, uses, lambda _: self.gone.append(key))
        self.model.retire(key, len(pages), cost, uses)

    @precondition(lambda self: self.model.idle)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.idle)), "whom")
        del self.model.idle[key]
        self._keep(list(self.pool.revive(key)))

    @invariant()
    def nobody_in_use_has_left(self) -> None:
        if hasattr(self, "pool"):
            in_use = [page for pages in self.in_use.values() for page in pages]
            self.pool.check_integrity(in_use)
            assert self.pool.num_idle == sum(size for _, size in self.model.idle.values())

    def _keep(self, pages: list[int]) -> None:
        self.in_use[self._next()] = pages

    def _next(self) -> int:
        self.arrivals += 1
        return self.arrivals


def test_what_leaves_is_what_the_paper_says() -> None:
    run_state_machine_as_test(
        PoolHistory, settings=settings(max_examples=150, stateful_step_count=50, deadline=None)
    )


SIZES = {"a": 1, "b": 2, "c": 3, "d": 4}


class PressedHistory(RuleBasedStateMachine):
    """More adapters than fit, some of them pinned."""

    worlds: Worlds

    @initialize(num_pages=st.integers(14, 22))
    def start(self, num_pages: int) -> None:
        self.w = self.worlds(num_pages=num_pages, block_size=2, adapters=SIZES)
        # Pages of the adapters that are used or pinned.
        self.held: dict[str, list[int]] = {}
        # Orders that were given and not taken back: the residency is not asked what it pins.
        self.pins: dict[str, Future[None]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=8),
        adapter=st.sampled_from([None, *SIZES, "a+b"]),
        max_tokens=st.integers(1, 6),
    )
    def submit(self, prompt: list[int], adapter: str | None, max_tokens: int) -> None:
        self.w.submit(prompt, adapter, max_tokens)

    @rule(adapter=st.sampled_from(list(SIZES)))
    def pin(self, adapter: str) -> None:
        if adapter not in self.pins:
            self.pins[adapter] = self.w.load(adapter, pin=True)

    @rule(adapter=st.sampled_from(list(SIZES)))
    def unpin(self, adapter: str) -> None:
        self.w.unpin(adapter)
        self.pins.pop(adapter, None)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.w.step()
            self.w.host.finish()
            self.check_held()

    def check_held(self) -> None:
        """Whatever is held after two steps has the same pages after both."""
        residency = self.w.residency
        self.pins = {a: o for a, o in self.pins.items() if not (o.done() and o.exception())}
        held = {a for a, order in self.pins.items() if order.done()}
        held |= {ref.id for s in self.w.scheduler.running for ref in s.adapter_refs}
        pages = {ref.id: list(entry.pages) for ref, entry in residency._entries.items()}
        resident = {adapter.id for adapter in residency.resident()}
        assert held <= resident, "it is used or pinned, but has left"
        for adapter in held & self.held.keys():
            assert pages[adapter] == self.held[adapter], "it was moved"
        self.held = {adapter: pages[adapter] for adapter in held}

    def teardown(self) -> None:
        if hasattr(self, "w"):
            for adapter in SIZES:
                self.w.unpin(adapter)
            self.w.drain()


def test_what_is_used_or_pinned_never_leaves(world: Worlds) -> None:
    class History(PressedHistory):
        worlds = world

    run_state_machine_as_test(
        History, settings=settings(max_examples=80, stateful_step_count=30, deadline=None)
    )
