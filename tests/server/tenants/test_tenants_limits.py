"""The token bucket, and the room for choices."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, strategies as st

from polydelta.server.errors import ApiError
from polydelta.server.metrics.refusals import TENANT_CONCURRENCY, TENANT_RATE
from polydelta.server.tenants.limits import Budget, Budgets, TokenBucket
from polydelta.server.tenants.tenant import OPERATOR, Tenant


class Clock:
    def __init__(self, now=1e5):
        self.now = now

    def __call__(self):
        return self.now


# What happens to a bucket: seconds go by, or tokens are charged.
SECONDS = st.floats(0, 300).map(lambda seconds: ("pass", seconds))
TOKENS = st.integers(0, 5000).map(lambda tokens: ("charge", tokens))
RATES = st.integers(1, 100_000)


@given(rate=RATES, events=st.lists(SECONDS | TOKENS, max_size=30))
def test_whoever_waits_as_long_as_he_is_told_finds_a_token_and_nobody_does_much_sooner(
    rate, events
):
    clock = Clock()
    bucket = TokenBucket(rate, clock)
    for event, amount in events:
        if event == "pass":
            clock.now += amount
        else:
            bucket.charge(amount)
    wait = bucket.wait()
    if wait == 0:
        return
    # A millisecond for rounding: the clock's numbers are large.
    one_token = 60 / rate
    clock.now += max(0.0, wait - one_token - 1e-3)
    assert bucket.wait() > 0
    clock.now += one_token + 2e-3
    assert bucket.wait() == 0


@given(
    rate=RATES,
    requests=st.lists(st.tuples(st.floats(0, 60), st.integers(1, 3000)), min_size=1, max_size=60),
)
def test_whatever_is_asked_for_no_more_is_taken_than_the_rate_a_minute_at_once_and_one_debt(
    rate, requests
):
    clock = Clock()
    bucket = TokenBucket(rate, clock)
    start, taken = clock.now, 0
    for pause, tokens in requests:
        clock.now += pause
        if bucket.wait() == 0:
            bucket.charge(tokens)
            taken += tokens
    largest = max(tokens for _, tokens in requests)
    assert taken <= rate + (clock.now - start) * rate / 60 + largest + 1e-3


@given(rate=RATES, seconds=st.floats(0, 1e6))
def test_what_is_not_used_within_a_minute_is_lost(rate, seconds):
    clock = Clock()
    bucket = TokenBucket(rate, clock)
    clock.now += seconds
    bucket.charge(rate)
    assert bucket.wait() == pytest.approx(60 / rate)


def test_a_debt_is_paid_at_the_rate():
    clock = Clock()
    bucket = TokenBucket(600, clock)
    bucket.charge(600 + 95)
    assert bucket.wait() == pytest.approx(9.6)
    clock.now += 9.6
    assert bucket.wait() == 0


def test_what_is_given_back_fills_it_no_further_than_to_the_brim():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.charge(-1000)
    bucket.charge(61)
    assert bucket.wait() == pytest.approx(2.0)


def test_threads_may_charge_it_together():
    bucket = TokenBucket(8000, Clock())
    threads = [
        threading.Thread(target=lambda: [bucket.charge(1) for _ in range(2000)]) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bucket.wait() == pytest.approx(2001 * 60 / 8000)


def refused(budget, choices=1, prompt_tokens=1):
    with pytest.raises(ApiError) as caught:
        budget.take(choices, prompt_tokens)
    return caught.value


def test_a_prompt_is_charged_at_once_and_an_answer_as_it_comes():
    clock = Clock()
    budget = Budget(Tenant("acme", tokens_per_minute=60), clock)
    budget.take(1, 50)
    budget.take(1, 4)
    budget.charge(6)
    error = refused(budget)
    assert (error.status, error.reason, error.headers) == (429, TENANT_RATE, {"Retry-After": "1"})
    assert "60 tokens a minute" in error.message
    clock.now += 1
    budget.take(1, 30)
    assert refused(budget).headers == {"Retry-After": "30"}


def test_choices_have_room_until_it_is_given_back():
    budget = Budget(Tenant("acme", max_concurrent=5))
    budget.take(3, 10)
    error = refused(budget, choices=3)
    assert (error.status, error.reason) == (429, TENANT_CONCURRENCY)
    assert error.headers == {"Retry-After": "1"}
    assert "5 choices" in error.message
    assert "3 are under way" in error.message
    budget.take(2, 10)
    budget.give_back(3)
    budget.take(3, 10)
    assert refused(budget).status == 429


def test_more_choices_than_there_can_ever_be_are_not_worth_another_try():
    budget = Budget(Tenant("acme", max_concurrent=2))
    error = refused(budget, choices=3)
    assert (error.status, error.headers) == (400, {})
    assert "3 choices" in error.message
    budget.take(2, 1)


def test_a_refusal_takes_nothing():
    clock = Clock()
    budget = Budget(Tenant("acme", max_concurrent=2, tokens_per_minute=60), clock)
    budget.take(1, 60)
    assert refused(budget, prompt_tokens=1000).reason == TENANT_RATE
    assert refused(budget, choices=2, prompt_tokens=1000).reason == TENANT_CONCURRENCY
    clock.now += 1
    budget.take(1, 1)


def test_each_tenant_has_its_own_and_an_operator_has_no_limits():
    budgets = Budgets()
    acme, other = Tenant("acme", max_concurrent=1), Tenant("other", max_concurrent=1)
    budgets.of(acme).take(1, 1)
    budgets.of(other).take(1, 1)
    assert refused(budgets.of(acme)).status == 429
    for _ in range(100):
        budgets.of(OPERATOR).take(1000, 10**9)
        budgets.of(OPERATOR).charge(10**9)
