"""How much each adapter is used, with few names for many adapters."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given, settings, strategies as st

from polydelta.engine.adapter_usage import CANDIDATES, AdapterUsage


def use(usage: AdapterUsage, adapter_id: str) -> None:
    usage.use(adapter_id).requests += 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=300), st.integers(0, 5))
def test_nothing_is_lost_nothing_counted_twice_and_names_are_few(
    requests: list[int], most: int
) -> None:
    usage, others = AdapterUsage(most), 0
    for number in requests:
        use(usage, str(number) if number else "")
        now = usage.snapshot()
        assert len(now.named.keys() - {""}) <= most
        # A counter that fell would look like a server that was started again.
        assert now.others.requests >= others
        others = now.others.requests
    now, true = usage.snapshot(), Counter(str(number) if number else "" for number in requests)
    assert now.total().requests == len(requests)
    assert all(counts.requests <= true[name] for name, counts in now.named.items())
    assert now.named[""].requests == true[""] if true[""] else "" not in now.named


def test_the_busiest_have_the_names() -> None:
    random, usage = Random(3), AdapterUsage(5)
    for _ in range(4000):
        use(usage, f"rare-{random.randrange(500)}")
        use(usage, f"busy-{random.randrange(5)}")
    assert usage.snapshot().named.keys() == {f"busy-{number}" for number in range(5)}


def test_those_who_are_busy_now_take_names_from_those_who_were() -> None:
    usage = AdapterUsage(2)
    for _ in range(50):
        use(usage, "old")
    for number in range(300_000):
        use(usage, f"new-{number % 2}")
    assert usage.snapshot().named.keys() == {"new-0", "new-1"}


def test_what_is_remembered_of_those_without_a_name_is_bounded() -> None:
    usage = AdapterUsage(3)
    for number in range(10_000):
        use(usage, str(number))
    assert len(usage._scores) <= 2 * (3 * CANDIDATES + 1) + 1
    assert usage.snapshot().total().requests == 10_000


def test_what_happens_before_the_first_request_is_the_others() -> None:
    usage = AdapterUsage(1)
    usage.counts("loaded-by-order").swap_ins += 1
    assert usage.snapshot().others.swap_ins == 1
