"""Orders of an operator: into the pool, out of it, kept in it."""

from __future__ import annotations

from typing import Any

import pytest

from polydelta.adapters_store.errors import AdapterError, InUseError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.residency import ResidencyState

# The class `World` of conftest.py.
Worlds = Any


def ref(world: Any, adapter: str) -> AdapterRef:
    sequence = world.submit([1], adapter)
    world.scheduler.remove(sequence)
    return sequence.adapter_refs[0]


def test_a_loaded_adapter_lies_in_the_pool_before_anybody_asks(world: Worlds) -> None:
    w = world(adapters={"a": 3})
    done = w.load("a")
    w.step()
    assert not done.done()
    w.host.finish()
    w.step()
    assert done.result() is None
    assert w.residency.num_idle_pages() == 3
    w.submit([1, 2], "a")
    w.drain()
    assert w.host.asked == ["a"]


def test_a_loaded_adapter_leaves_when_its_room_is_needed_and_a_pinned_one_does_not(
    world: Worlds,
) -> None:
    w = world(num_pages=8, block_size=4, adapters={"a": 3, "b": 3})
    w.load("a")
    w.load("b", pin=True)
    w.drain()
    w.submit(range(18), max_tokens=2)
    w.drain()
    assert [r.id for r in w.residency.resident()] == ["b"]


def test_an_unpinned_adapter_may_leave_again(world: Worlds) -> None:
    w = world(num_pages=8, block_size=4, adapters={"a": 3})
    w.load("a", pin=True)
    w.drain()
    w.unpin("a")
    w.unpin("a")
    w.submit(range(24), max_tokens=4)
    w.drain()
    assert w.residency.resident() == []


def test_pins_hold_half_of_the_pool_at_most(world: Worlds) -> None:
    w = world(num_pages=10, adapters={"a": 3, "b": 3, "too large": 11})
    first, second, third = w.load("a", pin=True), w.load("b", pin=True), w.load("too large")
    w.drain()
    assert first.result() is None
    with pytest.raises(AdapterError, match=r"'b@1' needs 3 pages .* pinned adapters may"):
        second.result()
    with pytest.raises(AdapterError, match="needs 11 pages of the pool, which has 10"):
        third.result()


def test_pinning_twice_is_pinning_once(world: Worlds) -> None:
    w = world(adapters={"a": 3})
    w.load("a", pin=True)
    w.load("a", pin=True)
    w.drain()
    w.unpin("a")
    assert w.residency.used_pages() == []


def test_a_request_that_pinned_adapters_leave_no_room_for_is_refused(world: Worlds) -> None:
    w = world(num_pages=8, block_size=4, adapters={"a": 4})
    w.load("a", pin=True)
    w.drain()
    refused = w.submit(range(16), max_tokens=4)
    beside = w.submit(range(12), "a", max_tokens=4)
    w.drain()
    assert "8, 4 of which pinned adapters hold" in w.failed[refused]
    assert w.finished == [beside]


def test_an_order_for_an_adapter_that_cannot_be_read_fails_with_the_reason(world: Worlds) -> None:
    w = world(adapters={"a": 3})
    done = w.load("a")
    w.step()
    w.host.fail("a", "it is damaged")
    w.step()
    with pytest.raises(AdapterError, match="it is damaged"):
        done.result()


def test_an_order_waits_for_room(world: Worlds) -> None:
    w = world(num_pages=6, block_size=4, adapters={"a": 3})
    w.submit(range(14), max_tokens=3)
    done = w.load("a", pin=True)
    w.step()
    w.host.finish()
    w.step()
    assert not done.done()
    w.drain()
    assert done.result() is None


def test_an_evicted_adapter_leaves_the_pool_and_the_host(world: Worlds) -> None:
    w = world(adapters={"a": 3})
    w.load("a")
    w.drain()
    assert w.evict("a").result() is None
    assert w.residency.describe(ref(w, "a")).state is ResidencyState.ON_DISK
    assert w.host.forgotten == ["a"]
    assert w.pool.num_free == w.pool.num_pages


@pytest.mark.parametrize("pinned", [True, False])
def test_what_is_used_or_pinned_is_not_evicted(world: Worlds, pinned: bool) -> None:
    w = world(adapters={"a": 3})
    if pinned:
        w.load("a", pin=True)
        w.drain()
    else:
        w.submit([1], "a", max_tokens=5)
        w.step()
        w.host.finish()
        w.step()
    with pytest.raises(InUseError, match="pinned" if pinned else "in use"):
        w.evict("a").result()
    w.drain()


def test_a_deleted_version_leaves_no_page_behind(world: Worlds) -> None:
    w = world(block_size=2, adapters={"a": 3, "b": 2})
    for adapter in ("a", "b", "a+b"):
        w.submit(range(9), adapter)
    w.drain()
    w.load("a", pin=True)
    w.drain()
    w.forget("a")
    w.check()
    assert [r.id for r in w.residency.resident()] == ["b"]
    cached = w.pool.num_idle - w.residency.num_idle_pages()
    assert cached == 4, "only what b made alone is still known"


def test_a_version_that_is_deleted_in_use_goes_with_its_last_user(world: Worlds) -> None:
    w = world(adapters={"a": 3})
    w.submit([1], "a", max_tokens=5)
    w.step()
    w.host.finish()
    w.step()
    w.forget("a")
    w.check()
    w.drain()
    assert w.residency.resident() == []
    assert w.pool.num_idle - w.residency.num_idle_pages() <= 1


def test_orders_end_when_the_engine_does(world: Worlds) -> None:
    w = world(adapters={"a": 3})
    done = w.load("a")
    w.control.close()
    with pytest.raises(AdapterError, match="stopped"):
        done.result()
