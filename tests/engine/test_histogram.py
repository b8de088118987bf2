"""Observations in buckets."""

from __future__ import annotations

import math

from hypothesis import given, strategies as st

from polydelta.engine.histogram import Histogram


def test_a_value_that_equals_a_bound_is_within_it() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0.0, 1.0, 1.5, 2.5, 2.6, 100.0):
        histogram.observe(value)
    now = histogram.distribution()
    assert now.counts == (2, 2, 2)
    assert (now.num, now.total) == (6, 107.6)


@given(
    st.lists(st.floats(-10, 10), max_size=30),
    st.lists(st.floats(-9, 9), min_size=1, unique=True).map(sorted),
)
def test_every_value_is_in_the_first_bucket_that_has_room_for_it(
    values: list[float], bounds: list[float]
) -> None:
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    now = histogram.distribution()
    for place, bound in enumerate([*bounds, math.inf]):
        assert sum(now.counts[: place + 1]) == sum(value <= bound for value in values)
