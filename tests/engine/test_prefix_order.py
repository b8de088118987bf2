"""In which order prefix blocks leave: a block is worthless without those before it, and without the
adapter version that made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import given, settings, strategies as st

from polydelta.engine.eviction import EvictionReason
from polydelta.engine.kv_cache import KVCache

Worlds = Callable[..., Any]

BLOCK = 2


def chains(kv: KVCache, world: Any) -> Iterator[list[bytes]]:
    """The blocks of every sequence that ever was, in their order."""
    for sequence in world.submitted:
        yield sequence.block_hashes


def test_a_block_never_leaves_before_those_behind_it(world: Worlds) -> None:
    branches = st.lists(st.integers(0, 1), min_size=1, max_size=14)

    @settings(max_examples=80, deadline=None)
    @given(
        st.lists(
            st.tuples(branches, st.sampled_from([None, "a", "b"]), st.integers(1, 5)),
            min_size=1,
            max_size=25,
        ),
        st.integers(10, 24),
        st.data(),
    )
    def holds(requests: Any, num_pages: int, data: st.DataObject) -> None:
        w = world(num_pages=num_pages, block_size=BLOCK, adapters={"a": 1, "b": 2})
        for prompt, adapter, max_tokens in requests:
            w.submit(prompt, adapter, max_tokens)
            for _ in range(data.draw(st.integers(0, 4), "steps")):
                w.step()
                w.host.finish()
                for hashes in chains(w.kv, w):
                    known = [block in w.kv._by_hash for block in hashes]
                    assert known == sorted(known, reverse=True), "a chain with a hole in it"
        w.drain()

    holds()


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
        assert not any(block in w.kv._by_hash for block in sequence.block_hashes)
    assert any(block in w.kv._by_hash for block in base.block_hashes)
    assert w.stats().prefix_evictions_by_reason[EvictionReason.DELETED] > 0
    assert w.stats().prefix_evictions_by_reason[EvictionReason.ROOM] == 0
