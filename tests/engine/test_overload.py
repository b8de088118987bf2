"""Who is refused, and when, over make-believe memory and with a clock that tests move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from polydelta.engine.overload import QueueLimits
from polydelta.engine.request import ErrorKind, RequestError
from polydelta.engine.sequence import Sequence

Worlds = Callable[..., Any]

STEP_SECONDS = 0.1


def step(w: Any) -> list[RequestError]:
    """One turn of the loop, which takes a tenth of a second; what those who left were told."""
    w.now += STEP_SECONDS
    before = set(w.failed)
    w.step()
    return [w.errors[sequence] for sequence in w.failed if sequence not in before]


def test_without_limits_nobody_is_refused(world: Worlds) -> None:
    w = world(max_batch_size=1)
    for _ in range(300):
        w.submit([1])
    assert step(w) == []
    w.now += 1e6
    assert step(w) == []


def test_as_many_may_wait_as_the_limit_says_beside_those_that_can_run(world: Worlds) -> None:
    w = world(max_batch_size=2, queue=QueueLimits(max_waiting=3))
    each = [w.submit([1], max_tokens=4) for _ in range(7)]
    (first, second) = step(w)
    assert list(w.failed) == each[:4:-1]
    assert first.kind is second.kind is ErrorKind.QUEUE_FULL
    assert first.message == "The server is busy: more than 3 requests wait. Try again later."
    assert first.retry_after is not None
    assert first.retry_after >= 1
    w.drain()
    assert len(w.finished) == 5
    w.submit([1])
    w.drain()
    assert len(w.finished) == 6


def test_prompts_of_those_that_wait_have_so_many_tokens_at_most(world: Worlds) -> None:
    w = world(max_batch_size=1, num_pages=50, queue=QueueLimits(max_waiting_tokens=20))
    w.submit(range(30))  # alone, it may be as long as it likes
    step(w)
    w.submit(range(3), max_tokens=5)
    step(w)
    kept = [w.submit(range(9)), w.submit(range(11))]
    refused = w.submit([1])
    (error,) = step(w)
    assert list(w.failed) == [refused]
    assert error.kind is ErrorKind.QUEUE_FULL
    assert "have more than 20 tokens" in error.message
    w.drain()
    assert set(kept) <= set(w.finished)


def test_limits_count_those_that_wait_for_memory_and_not_those_that_enter_at_once(
    world: Worlds,
) -> None:
    w = world(max_batch_size=50, num_pages=4, block_size=4, queue=QueueLimits(max_waiting=3))
    each = [w.submit(range(5), max_tokens=3) for _ in range(9)]
    errors = step(w)
    # Two of two pages each run.
    assert len(errors) == 4
    assert set(w.failed) == set(each[5:])
    w.drain()
    assert len(w.finished) == 5


def test_of_a_flood_and_a_light_tenant_the_flood_is_refused_when_the_queue_is_full(
    world: Worlds,
) -> None:
    w = world(max_batch_size=1, queue=QueueLimits(max_waiting=4), policy="fair")
    for _ in range(4):
        w.submit([1], max_tokens=6, tenant="flood")
    step(w)
    light = w.submit([1], tenant="light")
    for _ in range(5):
        w.submit([1], max_tokens=6, tenant="flood")
    step(w)
    w.drain()
    assert light in w.finished
    assert {s.request.tenant for s in w.failed} == {"flood"}


def test_one_slow_first_token_does_not_lead_to_refusals_for_ever(world: Worlds) -> None:
    w = world(queue=QueueLimits(ttft_slo=1.0))
    w.submit([1])
    w.scheduler.schedule()  # it is admitted, and its step takes twenty seconds
    w.now += 20
    step(w)
    for _ in range(5):
        w.now += 600
        w.submit([1])
        assert step(w) == []


def test_a_queue_that_has_ended_tells_nothing_of_the_next_one(world: Worlds) -> None:
    w = world(max_batch_size=1, queue=QueueLimits(ttft_slo=5.0), policy="fcfs")
    first = [w.submit([1], max_tokens=2) for _ in range(20)]
    while len(w.finished) < 12:
        step(w)
    for one in first:
        if one in w.scheduler.waiting:
            w.scheduler.remove(one)
    w.drain()
    w.now += 3600
    for _ in range(9):
        w.submit([1], max_tokens=2)
    assert step(w) == []


def test_all_that_are_late_are_refused_at_once(world: Worlds) -> None:
    w = world(max_batch_size=1, num_pages=100, queue=QueueLimits(ttft_slo=1.0))
    w.submit([1], max_tokens=300)
    step(w)
    late = [w.submit([2]) for _ in range(20)]
    w.now += 1.5
    assert len(step(w)) == 20
    assert set(w.failed) == set(late)


def test_a_request_that_has_waited_too_long_is_refused_before_it_runs(world: Worlds) -> None:
    w = world(max_batch_size=1, num_pages=100, queue=QueueLimits(ttft_slo=1.0))
    w.submit([1], max_tokens=300)
    step(w)
    late = w.submit([2])
    for _ in range(9):
        assert step(w) == []
    (error,) = [*step(w), *step(w)]
    assert list(w.failed) == [late]
    assert error.kind is ErrorKind.LATE
    assert "1 s is its limit" in error.message


def test_a_request_that_would_be_late_is_refused_when_it_comes(world: Worlds) -> None:
    """Once it is known how fast the queue is let in: here one each two steps."""
    w = world(max_batch_size=1, queue=QueueLimits(ttft_slo=5.0), policy="fcfs")
    for _ in range(24):
        w.submit([1], max_tokens=2)
    while len(w.finished) < 12:
        assert step(w) == []
    waiting = len(w.scheduler.waiting)
    accepted: list[Sequence] = []
    while not (errors := step(w)):
        accepted += [w.submit([1], max_tokens=2) for _ in range(2)]
    assert {error.kind for error in errors} == {ErrorKind.LATE}
    # Nobody who had come before was: those that left are the last ones.
    assert set(w.failed) <= set(accepted[-2:])
    # Five seconds are fifty steps, which let in twenty-five.
    assert len(w.scheduler.waiting) == pytest.approx(25, abs=3)
    assert waiting < 13
    (error, *_) = errors
    assert error.retry_after == math.ceil(error.retry_after or 0.5)
    w.drain()


def test_a_fair_queue_refuses_whom_it_would_serve_late_and_not_others(world: Worlds) -> None:
    w = world(max_batch_size=1, queue=QueueLimits(ttft_slo=5.0), policy="fair")
    for _ in range(60):
        w.submit([1], max_tokens=2, tenant="flood")
        step(w)
    flood = [w.submit([1], max_tokens=2, tenant="flood") for _ in range(40)]
    light = w.submit([1], max_tokens=2, tenant="light")
    w.drain()
    assert light in w.finished
    assert set(w.failed) & set(flood)


def test_what_was_begun_is_never_refused(world: Worlds) -> None:
    """Preempted, it waits again, longer than any deadline."""
    w = world(
        num_pages=7, block_size=4, queue=QueueLimits(ttft_slo=1.0), prefix_caching=False
    )  # fmt: skip
    first, second = w.submit(range(8), max_tokens=16), w.submit(range(8), max_tokens=16)
    while not second.num_preemptions:
        step(w)
    for _ in range(40):
        step(w)
    assert w.failed == {}
    w.drain()
    assert w.finished == [first, second]


def test_the_loop_is_told_when_to_look_again_though_nothing_happens(world: Worlds) -> None:
    w = world(adapters={"slow": 1}, queue=QueueLimits(ttft_slo=2.0))
    assert w.scheduler.seconds_to_deadline() is None
    waits = w.submit([1], "slow")
    assert step(w) == []
    assert w.scheduler.seconds_to_deadline() == pytest.approx(1.9)
    w.now += 1.9
    (error,) = step(w)
    assert error.kind is ErrorKind.LATE
    assert list(w.failed) == [waits]
    assert w.scheduler.seconds_to_deadline() is None


def test_without_a_deadline_the_loop_may_rest_for_ever(world: Worlds) -> None:
    w = world(adapters={"slow": 1})
    w.submit([1], "slow")
    w.step()
    assert w.scheduler.seconds_to_deadline() is None
