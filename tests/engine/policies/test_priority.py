"""Priorities, in steps of a scheduler over make-believe memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polydelta.engine.policies.priority import SECONDS_A_LEVEL

Worlds = Callable[..., Any]


def test_lower_numbers_enter_first_and_equal_ones_in_the_order_of_arrival(world: Worlds) -> None:
    w = world(max_batch_size=1, policy="priority")
    levels = [0, 3, -1, 0, -1]
    each = [w.submit([1], priority=level) for level in levels]
    w.drain()
    assert w.finished == [each[place] for place in (2, 4, 0, 3, 1)]


def test_the_last_number_is_preempted_first_and_of_that_the_youngest(world: Worlds) -> None:
    w = world(num_pages=5, block_size=4, policy="priority", prefix_caching=False)
    low = w.submit(range(4), max_tokens=9, priority=1)
    low_too = w.submit(range(4), max_tokens=9, priority=1)
    high = w.submit(range(4), max_tokens=9, priority=0)
    while not w.finished:
        w.step()
    assert w.finished == [high]
    assert low_too.num_preemptions > 0
    assert high.num_preemptions == 0
    w.drain()
    assert set(w.finished) == {low, low_too, high}


def test_waiting_long_enough_makes_up_for_any_priority(world: Worlds) -> None:
    w = world(max_batch_size=1, policy="priority")
    patient = w.submit([1], priority=2)
    for _ in range(6):
        w.submit([1], priority=0)
    w.step()
    w.now += 2 * SECONDS_A_LEVEL + 1
    newcomers = [w.submit([1], priority=0) for _ in range(5)]
    w.drain()
    assert all(w.finished.index(patient) < w.finished.index(one) for one in newcomers)


def test_first_come_first_served_looks_at_no_priority(world: Worlds) -> None:
    w = world(max_batch_size=1, policy="fcfs")
    each = [w.submit([1], priority=level) for level in (5, 0, -3)]
    w.drain()
    assert w.finished == each
