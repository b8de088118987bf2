"""Orders of an operator: into the pool, out of it, kept in it."""

from __future__ import annotations

from typing import Any

import pytest

from polydelta.adapters_store.errors import AdapterError, InUseError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.adapter_entry import ResidencyState

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


@pytest.mark.parametrize("pin", [False, True])
def test_more_virtual_tokens_than_positions_never_come_into_the_pool(
    world: Worlds, pin: bool
) -> None:
    """Computing their keys and values would end the engine: positions have an end."""
    traits = {"long": AdapterTraits(num_prefix_tokens=39), "fits": AdapterTraits(38)}
    w = world(num_pages=40, max_positions=40, adapters={"long": 0, "fits": 0}, traits=traits)
    refused, done = w.load("long", pin=pin), w.load("fits", pin=pin)
    w.drain()
    with pytest.raises(AdapterError, match=r"'long@1' puts 39 virtual .* window is 40 tokens"):
        refused.result()
    assert done.result() is None
    assert [r.id for r in w.residency.resident()] == ["fits"]


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
    w.evict("a")
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
        w.evict("a")
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


def test_refused_pins_leave_nothing_on_its_way(world: Worlds) -> None:
    """Each held host RAM and one of the places for what is loaded ahead."""
    names = [f"pinned {number}" for number in range(11)]
    w = world(num_pages=4, adapters=dict.fromkeys(names, 3) | {"a": 1, "b": 1})
    orders = [w.load(name, pin=True) for name in names]
    w.drain()
    assert all("pinned adapters may hold half" in str(order.exception()) for order in orders)
    assert w.residency.num_on_their_way() == 0
    for name in ("a", "b"):
        w.submit([1], name)
    w.step()
    assert w.host.asked[-2:] == ["a", "b"]
    w.drain()


@pytest.mark.parametrize("end", ["unpin", "withdraw", "close"])
def test_an_order_that_ends_lets_go_of_what_was_loaded_for_it(world: Worlds, end: str) -> None:
    w = world(num_pages=6, adapters={"a": 3})
    w.submit(range(14), max_tokens=3)
    order = w.load("a", pin=True)
    w.step()
    w.host.finish()
    w.step()
    assert w.residency.num_on_their_way() == 1
    {
        "unpin": lambda: w.unpin("a"),
        "withdraw": lambda: w.withdraw(order),
        "close": w.control.close,
    }[end]()
    assert isinstance(order.exception(), AdapterError)
    assert w.residency.num_on_their_way() == 0
    w.drain()
    assert w.residency.resident() == []


def test_an_order_that_ends_leaves_the_adapter_to_others_who_wait_for_it(world: Worlds) -> None:
    w = world(num_pages=6, adapters={"a": 3, "b": 3})
    w.submit(range(14), max_tokens=3)
    w.step()
    w.submit([1], "a")
    orders = [w.load("a", pin=True), w.load("b", pin=True), w.load("b")]
    w.step()
    w.host.finish()
    w.step()
    w.withdraw(orders[0])
    w.withdraw(orders[1])
    assert w.residency.num_on_their_way() == 2
    w.drain()
    assert orders[2].result() is None
    assert w.host.asked == ["a", "b"]


def test_withdrawing_an_order_that_was_carried_out_changes_nothing(world: Worlds) -> None:
    w = world(adapters={"a": 3})
    order = w.load("a", pin=True)
    w.drain()
    w.withdraw(order)
    assert order.result() is None
    assert w.residency.is_pinned(ref(w, "a"))


def test_a_load_that_pinned_adapters_leave_no_room_for_is_refused(world: Worlds) -> None:
    w = world(num_pages=8, adapters={"a": 4, "b": 5})
    w.load("a", pin=True)
    w.drain()
    order = w.load("b")
    w.drain()
    with pytest.raises(AdapterError, match=r"has 8, 4 of which other pinned .*: unpin others, or"):
        order.result()
    w.unpin("a")
    again = w.load("b")
    w.drain()
    assert again.result() is None


def test_one_failed_load_ends_every_order_and_every_request_for_the_adapter(
    world: Worlds,
) -> None:
    w = world(max_batch_size=1, adapters={"a": 3})
    orders = [w.load("a"), w.load("a", pin=True), w.load("a")]
    w.submit([7], max_tokens=9)
    waiting = [w.submit([number], "a") for number in range(2)]
    w.step()
    w.host.fail("a", "it is damaged")
    w.step()
    assert [str(order.exception(timeout=0)) for order in orders] == ["it is damaged"] * 3
    assert w.failed == dict.fromkeys(waiting, "it is damaged")
    assert w.host.asked == ["a"]
    assert w.residency.describe(ref(w, "a")).state is ResidencyState.ON_DISK
    w.drain()
