"""Counters of what each customer was served, against a plain model of the paper's."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, strategies as st

from polydelta.engine.policies.virtual_counters import MOST_IDLE, VirtualCounters

customers = st.sampled_from("abcd")
events = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["queued", "left"]), customers, st.just(0)),
        st.tuples(st.just("charge"), customers, st.integers(1, 9)),
    ),
    max_size=60,
)


@given(events)
def test_any_history_gives_the_counters_of_the_paper(history: list[tuple[str, str, int]]) -> None:
    counters = VirtualCounters[str]()
    served: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    last = None
    for event, who, amount in history:
        if event == "queued":
            if not waiting[who]:
                others = [served[one] for one in waiting if waiting[one]]
                floor = min(others) if others else served[last] if last else 0
                served[who] = max(served[who], floor)
            waiting[who] += 1
            counters.queued(who)
        elif event == "left" and waiting[who]:
            waiting[who] -= 1
            last = last if waiting[who] else who
            counters.left_queue(who)
        elif event == "charge":
            served[who] += amount
            counters.charge(who, amount)
        assert {one: counters[one] for one in "abcd"} == {one: served[one] for one in "abcd"}
        assert {one: counters.waiting(one) for one in "abcd"} == {
            one: waiting[one] for one in "abcd"
        }


def test_customers_who_left_are_forgotten_when_that_changes_nothing() -> None:
    counters = VirtualCounters[int]()
    for number in range(3 * MOST_IDLE):
        counters.queued(number)
        counters.charge(number, 1.0)
        counters.left_queue(number)
    assert len(counters._served) <= MOST_IDLE + 1
    newest = 3 * MOST_IDLE - 1
    counters.queued(newest)
    counters.queued(0)
    assert counters[0] == counters[newest]
