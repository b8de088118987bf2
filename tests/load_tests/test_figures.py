"""Figures of runs that are small enough to work them out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from load_tests.driver import Record
from load_tests.figures import (
    AdapterService,
    attainment,
    figures,
    jain,
    max_over_min,
    outcomes,
    satisfaction,
    services,
    throughput,
)


def served(adapter: int | None, due: float, first: float, ended: float, tokens: int) -> Record:
    """first: seconds to the first token."""
    times = (due + first, ended) if tokens > 1 else (due + first,)
    return Record(adapter, 8, tokens, due, due, ended, 200, tokens, times)


def refused(adapter: int | None, due: float, status: int) -> Record:
    return Record(adapter, 8, 8, due, due, due + 0.5, status, error="no")


RECORDS = [
    served(0, due=0.0, first=1.0, ended=4.0, tokens=8),  # 2 tokens a second
    served(0, due=1.0, first=3.0, ended=5.0, tokens=16),  # 4
    served(1, due=2.0, first=6.0, ended=10.0, tokens=8),  # 1
    refused(1, due=3.0, status=503),
    served(None, due=4.0, first=0.0, ended=6.0, tokens=4),  # 2
]


def test_throughput_is_that_of_served_requests_until_the_last_one_ends():
    found = throughput(RECORDS)
    assert (found.seconds, found.requests, found.output_tokens) == (10.0, 4, 36)
    assert found.requests_per_second == pytest.approx(0.4)
    assert found.tokens_per_second == pytest.approx(3.6)


def test_throughput_without_the_ends_leaves_out_what_ended_there():
    found = throughput(RECORDS, edge=4.5)
    # Of the second from 4.5 to 5.5 s.
    assert (found.seconds, found.requests, found.output_tokens) == (1.0, 1, 16)
    nothing = throughput(RECORDS, edge=6.0)
    assert (nothing.seconds, nothing.requests, nothing.requests_per_second) == (0.0, 0, 0.0)


def test_attainment_counts_refused_requests_as_missed():
    # 1, 3 and 0 s are below 6 s; 6 s is not, and one was refused.
    assert attainment(RECORDS, 6.0) == pytest.approx(3 / 5)
    assert attainment(RECORDS, 2.0) == pytest.approx(2 / 5)


def test_satisfaction_falls_with_the_square_of_the_wait():
    # 1 - 1/36, 1 - 9/36, 0, 0, 1
    assert satisfaction(RECORDS, 6.0) == pytest.approx((35 / 36 + 27 / 36 + 0 + 0 + 1) / 5)


def test_an_adapters_service_is_the_mean_over_its_requests():
    assert services(reversed(RECORDS)) == [
        AdapterService(None, 1, 2.0),
        AdapterService(0, 2, 3.0),
        AdapterService(1, 2, 0.5),
    ]


def test_jains_index_is_1_for_equals_and_1_over_n_when_one_has_all():
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert jain([1.0, 2.0, 3.0]) == pytest.approx(36 / (3 * 14))
    assert jain([]) is None
    assert jain([0.0, 0.0]) is None


def test_the_most_over_the_least():
    assert max_over_min([1.0, 4.0, 2.0]) == 4.0
    assert max_over_min([1.0, 0.0]) is None
    assert max_over_min([]) is None


def test_outcomes_are_counted_by_status():
    gone = Record(0, 8, 8, 0.0, 0.0, 1.0, 0, error="hung up")
    broken = Record(0, 8, 8, 0.0, 0.0, 1.0, 200, error="no usage")
    records = [*RECORDS, refused(0, 0.0, 429), refused(0, 0.0, 500), gone, broken]
    assert outcomes(records) == {
        "served": 4,
        "503": 1,
        "429": 1,
        "500": 1,
        "no answer": 1,
        "broken": 1,
    }
    found = figures(records, 6.0, 1.0)
    # 429 and 503 are refusals; the rest has failed.
    assert (found["requests"], found["refused"], found["failed"]) == (9, 2, 3)


def test_all_figures_of_a_run():
    found = figures(RECORDS, bound=6.0, edge=4.5)
    assert found["throughput"] == {
        "seconds": 10.0,
        "requests": 4,
        "requests_per_second": 0.4,
        "output_tokens_per_second": 3.6,
    }
    assert found["throughput_without_ends"]["output_tokens_per_second"] == 16.0
    assert found["first_token_ms"] == {"mean": 2500.0, "p50": 1000.0, "p90": 6000.0, "p99": 6000.0}
    # (4 - 1) / 7, (5 - 4) / 15, (10 - 8) / 7 and (6 - 4) / 3 s.
    assert found["per_token_ms"]["p50"] == pytest.approx(285.71)
    assert found["per_token_ms"]["p99"] == pytest.approx(666.67)
    assert found["request_ms"]["p90"] == 8000.0
    assert found["slo_attainment"] == 0.6
    assert found["satisfaction"] == pytest.approx(0.5444, abs=1e-4)
    # (2 + 3 + 0.5)^2 / (3 x (4 + 9 + 0.25))
    assert found["jain_fairness"] == pytest.approx(30.25 / 39.75, abs=1e-4)
    assert found["max_over_min_service"] == 6.0
    assert found["lateness_ms"]["p99"] == 0.0
    assert found["tenants"] == {}


def test_figures_of_single_tenants():
    light = [replace(one, tenant="light") for one in RECORDS[:2]]
    flood = [replace(one, tenant="flood") for one in RECORDS[2:4]]
    found = figures([*flood, *light, RECORDS[4]], bound=2.0, edge=0.0)["tenants"]
    assert found["light"]["outcomes"] == {"served": 2}
    assert found["light"]["first_token_ms"]["p90"] == 3000.0
    assert found["light"]["slo_attainment"] == 0.5
    assert (found["flood"]["requests"], found["flood"]["slo_attainment"]) == (2, 0.0)
    assert found["flood"]["outcomes"] == {"served": 1, "503": 1}


def test_a_run_of_which_nothing_was_served_has_figures_too():
    found = figures([refused(0, 0.0, 503)], 6.0, 1.0)
    assert (found["slo_attainment"], found["satisfaction"]) == (0.0, 0.0)
    assert found["first_token_ms"] is None
    assert found["per_token_ms"] is None
    assert found["jain_fairness"] is None
    assert figures([], 6.0, 1.0)["throughput"]["requests_per_second"] == 0.0
