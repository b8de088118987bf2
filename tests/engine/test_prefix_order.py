"""In which order prefix blocks leave: a block is worthless without those before it, and without the
adapter version that made it."""

from __future__ import annotations

from collections.abc import Callable
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

from polydelta.engine.eviction import EvictionReason
from polydelta.engine.kv_cache import KVCache

Worlds = Callable[..., Any]

BLOCK = 2


def check_chains(w: Any) -> None:
    """Of every sequence that ever was."""
    kv: KVCache = w.kv
    used = set(kv.used_pages())
    for sequence in w.submitted:
        blocks = [kv._known.by_hash.get(block_hash) for block_hash in sequence.block_hashes]
        known = [block for block in blocks if block is not None]
        assert known == blocks[: len(known)], "a chain with a hole in it"
        in_use = [block.page in used for block in known]
        assert in_use == sorted(in_use, reverse=True), "a block is used, one before it is not"


# Of tokens so few that prompts begin alike.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
ADAPTERS = st.sampled_from([None, "a", "b", "a+b"])


class ChainHistory(RuleBasedStateMachine):
    """Sequences that share beginnings, in a pool that has no room for all of them."""

    worlds: Worlds

    @initialize(num_pages=st.integers(12, 24), tokens=st.integers(3, 40), lag=st.integers(0, 1))
    def start(self, num_pages: int, tokens: int, lag: int) -> None:
        self.w = self.worlds(
            num_pages=num_pages,
            block_size=BLOCK,
            max_batch_tokens=tokens,
            adapters={"a": 1, "b": 2},
            lag=lag,
        )

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=3), adapter=ADAPTERS, n=st.integers(1, 5))
    def submit(self, prompts: list[list[int]], adapter: str | None, n: int) -> None:
        for prompt in prompts:
            self.w.submit(prompt, adapter, max_tokens=n)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.w.step()
            self.w.host.finish()
            check_chains(self.w)

    @rule(seconds=st.sampled_from([1e-9, 1.0, 1e9]))
    def prefills_take(self, seconds: float) -> None:
        self.w.kv.costs.observe_prefill(1, seconds)

    @precondition(lambda self: self.w.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.w.scheduler.remove(data.draw(st.sampled_from(self.w.live), "whom"))

    @rule(adapter=st.sampled_from(["a", "b"]))
    def delete(self, adapter: str) -> None:
        self.w.forget(adapter)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "w"):
            check_chains(self.w)
            self.w.check()

    def teardown(self) -> None:
        if hasattr(self, "w"):
            self.w.drain()
            check_chains(self.w)


def test_a_block_never_leaves_before_those_behind_it(world: Worlds) -> None:
    class History(ChainHistory):
        worlds = world

    run_state_machine_as_test(
        History, settings=settings(max_examples=100, stateful_step_count=30, deadline=None)
    )


def test_what_a_deleted_version_made_is_free_as_soon_as_nobody_uses_it(world: Worlds) -> None:
    w = world(num_pages=20, block_size=BLOCK, adapters={"a": 1, "b": 1})
    base = w.submit(range(9))
    w.drain()
    old = w.submit(range(9), "a")
    w.drain()
    running = w.submit(range(9), "a", max_tokens=4)
    of_both = w.submit(range(9), "a+b", max_tokens=4)
    w.step()
    assert running in w.scheduler.running
    kept = w.stats().pages_cached
    w.forget("a")
    # Those that run keep theirs, and publish nothing more.
    assert running in w.scheduler.running
    assert w.stats().pages_cached <= kept
    w.drain()
    w.check()
    assert {running, of_both} <= set(w.finished)
    for sequence in (old, running, of_both):
        assert not any(block in w.kv._known.by_hash for block in sequence.block_hashes)
    assert any(block in w.kv._known.by_hash for block in base.block_hashes)
    assert w.stats().prefix_evictions_by_reason[EvictionReason.DELETED] > 0
    assert w.stats().prefix_evictions_by_reason[EvictionReason.ROOM] == 0
