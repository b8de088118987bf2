"""Runs that are compared: their turns, the ratios and the bars."""

from __future__ import annotations

import json
from typing import Any

import pytest

from load_tests.comparisons import Compared, Comparison, compare, in_turn
from load_tests.run import Run
from load_tests.workload import Synthetic

LOAD = Synthetic(1.0, 2.0, 0)
A, B, C, D, E = (Run(name, LOAD) for name in "ABCDE")


def comparison(run: Run, against: Run | None, **fields: Any) -> Comparison:
    return Comparison("one / other", "throughput.tokens", run, against, **fields)


def result(run: str, tokens: float | None) -> dict[str, Any]:
    return {"run": run, "figures": {"throughput": {"tokens": tokens}}}


def names(runs: list[Run]) -> str:
    return "".join(run.name for run in runs)


def test_runs_take_turns_there_and_back():
    assert names(in_turn([comparison(A, B)])) == "ABBA"
    assert names(in_turn([comparison(A, B, turns=3)])) == "ABBAAB"
    assert names(in_turn([comparison(A, B), comparison(C, D, turns=1)])) == "ABBACD"


def test_runs_that_have_to_do_with_each_other_take_turns_together():
    assert names(in_turn([comparison(A, B), comparison(A, C)])) == "ABCCBA"
    assert names(in_turn([comparison(A, None), comparison(A, B, turns=3)])) == "ABBAAB"
    # A and C, D and E, and what holds all four together.
    linked = [comparison(A, C), comparison(D, E), comparison(C, E)]
    assert names(in_turn(linked)) == "ACDEEDCA"


def test_the_ratio_is_the_median_of_those_of_the_turns():
    results = [
        result("A", 90.0),
        result("B", 100.0),
        result("other", 1.0),
        result("B", 80.0),
        result("A", 80.0),
        result("A", 60.0),
        result("B", 50.0),
    ]
    (found,) = compare([comparison(A, B, at_least=0.95)], results)
    assert found.ratios == pytest.approx((0.9, 1.0, 1.2))
    assert found.ratio == 1.0
    assert found.met is True
    told = json.loads(json.dumps(found.to_json("suite")))
    assert told["values"] == [90.0, 80.0, 60.0]
    assert told["against_values"] == [100.0, 80.0, 50.0]
    assert (told["run"], told["against"], told["ratio"]) == ("A", "B", 1.0)
    assert (told["bar"], told["met"]) == ("at least 0.95", True)


def test_what_the_server_counted_can_be_compared_like_a_figure():
    counts = [
        {"run": run, "figures": {}, "server_counts": {"preemptions": count}}
        for run, count in (("A", 0.0), ("B", 8.0), ("B", 5.0), ("A", 4.0))
    ]
    fewer = Comparison("fewer", "server_counts.preemptions", A, B, at_most=0.99)
    (found,) = compare([fewer], counts)
    assert (found.values, found.against) == ((0.0, 4.0), (8.0, 5.0))
    assert found.ratio == pytest.approx(0.4)
    assert found.met is True


def test_a_machine_that_slows_down_evenly_does_so_for_both():
    speeds = zip(in_turn([comparison(A, B)]), (100.0, 98.0, 96.0, 94.0), strict=True)
    results = [result(run.name, speed) for run, speed in speeds]
    (found,) = compare([comparison(A, B)], results)
    assert found.ratio == pytest.approx(1.0, abs=1e-3)
    assert found.met is None


@pytest.mark.parametrize(
    ("fields", "ratio", "met"),
    [
        ({"at_least": 0.95}, 0.95, True),
        ({"at_least": 0.95}, 0.949, False),
        ({"at_most": 2.0}, 2.0, True),
        ({"at_most": 2.0}, 2.01, False),
        ({}, 7.0, None),
    ],
)
def test_bars_are_from_below_or_from_above(fields: dict[str, float], ratio: float, met: object):
    found = Compared(comparison(A, B, **fields), (ratio * 2,), (2.0,))
    assert found.met is met
    assert bool(found.comparison.bar) is bool(fields)


def test_a_figure_can_be_held_against_its_bar_as_it_is():
    results = [result("A", 0.8), result("A", 0.6)]
    (found,) = compare([comparison(A, None, at_least=0.7)], results)
    assert found.ratio == pytest.approx(0.7)
    assert found.against == ()
    assert found.to_json("suite")["against"] is None


def test_a_turn_without_a_figure_counts_for_neither():
    results = [result("A", None), result("B", 2.0), result("B", 4.0), result("A", 6.0)]
    (found,) = compare([comparison(A, B)], results)
    assert found.ratios == (1.5,)
    # A run that has not come yet, or of which nothing was served.
    assert compare([comparison(A, C)], results) == []
    assert compare([comparison(A, B)], [{"run": "A", "figures": {"throughput": None}}]) == []


def test_over_nothing_is_more_than_any_number():
    (found,) = compare([comparison(A, B, at_least=1)], [result("A", 0.5), result("B", 0.0)])
    assert found.met is True
    assert found.to_json("suite")["ratio"] is None
