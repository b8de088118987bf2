"""The order in which idle pages leave."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from polydelta.engine.eviction import CostModel, EvictionOrder


def leave_all(order: EvictionOrder) -> list[object]:
    keys: list[object] = []
    while len(order):
        keys.append(order.next_victim())
        order.remove(keys[-1])
    return keys


def test_the_least_worth_leaves_first_and_equals_in_the_order_they_came() -> None:
    order = EvictionOrder()
    for key, worth in {"b": 2.0, "first": 1.0, "second": 1.0, "a": 0.5}.items():
        order.add(key, worth)
    assert leave_all(order) == ["a", "first", "second", "b"]


def test_what_was_valuable_long_ago_ages() -> None:
    order = EvictionOrder()
    order.add("old and dear", 5.0)
    evictions = 0
    for number in range(100):
        order.add(number, 1.0)
        victim = order.next_victim()
        order.remove(victim)
        evictions += 1
        if victim == "old and dear":
            break
    assert 4 <= evictions <= 7


def test_asking_for_a_victim_does_not_remove_it() -> None:
    order = EvictionOrder()
    order.add("only", 1.0)
    assert order.next_victim() == order.next_victim() == "only"
    assert len(order) == 1


def test_what_comes_back_into_use_is_no_victim() -> None:
    order = EvictionOrder()
    order.add("cheap", 1.0)
    order.add("dear", 2.0)
    order.remove("cheap")
    assert leave_all(order) == ["dear"]


def test_what_retires_again_has_its_new_worth() -> None:
    order = EvictionOrder()
    order.add("twice", 1.0)
    order.add("once", 2.0)
    order.remove("twice")
    order.add("twice", 3.0)
    assert leave_all(order) == ["once", "twice"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.floats(0, 100)), max_size=200))
def test_every_victim_has_the_lowest_priority_of_a_plain_model(
    history: list[tuple[bool, int, float]],
) -> None:
    order = EvictionOrder()
    clock, arrivals = 0.0, 0
    model: dict[int, tuple[float, int]] = {}
    for evict, key, worth in history:
        if evict and model:
            expected = min(model, key=lambda k: model[k])
            assert order.next_victim() == expected
            clock = model.pop(expected)[0]
            order.remove(expected)
        elif key in model:
            order.remove(key)
            del model[key]
        else:
            order.add(key, worth)
            model[key] = (clock + worth, arrivals)
            arrivals += 1
        assert len(order) == len(model)


def test_memory_does_not_grow_with_entries_that_come_and_go() -> None:
    order = EvictionOrder()
    for number in range(5000):
        order.add(number % 7, float(number))
        order.remove(number % 7)
    assert len(order._heap) < 200


def test_measured_costs_replace_the_first_guess() -> None:
    costs = CostModel()
    for _ in range(200):
        costs.observe_prefill(tokens=100, seconds=2.0)
        costs.observe_load(num_bytes=1000, seconds=5.0)
    assert costs.prefill_seconds(10) == pytest.approx(0.2, rel=1e-3)
    assert costs.load_seconds(10) == pytest.approx(0.05, rel=1e-3)


def test_swapping_costs_nothing_before_it_was_measured_so_that_it_is() -> None:
    costs = CostModel()
    assert costs.swap_seconds(1000) == 0
    costs.observe_swap(num_bytes=500, seconds=2.0)
    assert costs.swap_seconds(1000) == pytest.approx(4.0)


def test_one_slow_copy_does_not_end_swapping_but_many_do() -> None:
    costs = CostModel()
    for _ in range(3):
        costs.observe_swap(num_bytes=1000, seconds=1e-3)
    costs.observe_swap(num_bytes=1000, seconds=70.0)
    assert costs.swap_seconds(3000) == pytest.approx(3e-3)
    for _ in range(5):
        costs.observe_swap(num_bytes=1000, seconds=0.5)
    assert costs.swap_seconds(3000) == pytest.approx(1.5)
