"""Drawn workloads: the same for a seed, and distributed as they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from load_tests.workload import Bursts, Power, Shift, Synthetic, Tenants, Zipf

LARGE = Synthetic(rate=50.0, duration=400.0, adapters=10, prompt_tokens=(8, 64))

workloads = st.builds(
    Synthetic,
    rate=st.floats(0.5, 40),
    duration=st.floats(1, 30),
    adapters=st.integers(0, 3000),
    popularity=st.one_of(st.builds(Power, st.floats(0.05, 3)), st.builds(Zipf, st.floats(0, 2.5))),
    cv=st.floats(0.3, 8),
    prompt_tokens=st.tuples(st.integers(1, 20), st.integers(21, 600)),
    output_tokens=st.tuples(st.integers(1, 20), st.integers(21, 600)),
    seed=st.integers(0, 2**32 - 1),
)


@given(workloads)
@settings(max_examples=60, deadline=None)
def test_what_is_drawn_keeps_to_what_was_asked(workload: Synthetic):
    requests = workload.requests()
    assert len(requests) == int(workload.rate * workload.duration)
    times = [one.at for one in requests]
    assert times == sorted(times)
    assert all(at >= 0 for at in times)
    for one in requests:
        assert workload.prompt_tokens[0] <= one.prompt_tokens < workload.prompt_tokens[1]
        assert workload.output_tokens[0] <= one.max_tokens < workload.output_tokens[1]
        if workload.adapters:
            assert one.adapter is not None
            assert 0 <= one.adapter < workload.adapters
        else:
            assert one.adapter is None


@given(workloads)
@settings(max_examples=30, deadline=None)
def test_the_same_seed_gives_the_same_requests(workload: Synthetic):
    assert workload.requests() == replace(workload).requests()


def test_another_seed_gives_other_requests():
    assert LARGE.requests() != replace(LARGE, seed=43).requests()


def test_the_order_of_drawing_is_that_of_s_lora():
    workload = Synthetic(10.0, 30.0, 200, Power(0.3), cv=2.0)
    np.random.seed(42)
    adapters = (np.random.power(0.3, 300) * 200).astype(int)
    prompts = np.random.randint(8, 512, 300)
    outputs = np.random.randint(8, 512, 300)
    gaps = np.random.gamma(1 / 4, 4 / 10, 300)
    requests = workload.requests()
    assert [one.adapter for one in requests] == adapters.tolist()
    assert [one.prompt_tokens for one in requests] == prompts.tolist()
    assert [one.max_tokens for one in requests] == outputs.tolist()
    assert [one.at for one in requests] == pytest.approx(np.cumsum(gaps).tolist())


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
def test_arrivals_have_the_rate_and_the_coefficient_of_variation(cv: float):
    times = [one.at for one in replace(LARGE, cv=cv).requests()]
    gaps = np.diff([0.0, *times])
    # 20,000 gaps: the mean's own deviation is cv / 141 of it, that of the cv some percent.
    assert 1 / gaps.mean() == pytest.approx(50.0, rel=4 * cv / 141)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)


def shares(workload: Synthetic) -> np.ndarray:
    counts = Counter(one.adapter for one in workload.requests())
    return np.asarray([counts[number] for number in range(workload.adapters)]) / counts.total()


def test_alpha_1_is_uniform():
    assert shares(LARGE) == pytest.approx(np.full(10, 0.1), abs=0.01)


def test_a_smaller_alpha_is_more_skewed_to_the_first_adapter():
    first = [shares(replace(LARGE, popularity=Power(alpha)))[0] for alpha in (1.0, 0.6, 0.3, 0.1)]
    # The share of adapter 0 of n is n^-alpha.
    assert first == pytest.approx([10**-1.0, 10**-0.6, 10**-0.3, 10**-0.1], abs=0.015)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_zipf_asks_for_adapters_in_the_ratios_of_its_law(exponent: float):
    found = shares(replace(LARGE, popularity=Zipf(exponent)))
    weights = np.arange(1, 11) ** -exponent
    assert found == pytest.approx(weights / weights.sum(), abs=0.015)


@given(workloads, st.floats(0.1, 0.8), st.floats(0.05, 0.99))
@settings(max_examples=40, deadline=None)
def test_bursts_keep_the_requests_and_their_order(of: Synthetic, share: float, force: float):
    every = 3.0
    bursts = Bursts(of, every, share * every, factor=force / share)
    before, after = of.requests(), bursts.requests()
    assert [replace(one, at=0.0) for one in before] == [replace(one, at=0.0) for one in after]
    times = [one.at for one in after]
    assert times == pytest.approx(sorted(times))
    # A request may come to lie on the edge of its period, no further.
    periods = [(one.at // every, new.at // every) for one, new in zip(before, after, strict=True)]
    assert all(abs(old - new) <= 1 for old, new in periods)
    assert bursts.adapters == of.adapters
    assert bursts.duration == of.duration


def test_a_burst_has_the_factor_times_the_rate():
    bursts = Bursts(LARGE, every=10.0, lasting=2.0, factor=4.0)
    within = np.asarray([one.at for one in bursts.requests()]) % 10.0
    assert (within < 2.0).mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("lasting", "factor"), [(2.0, 6.0), (11.0, 0.5), (0.0, 1.0), (2.0, 0.0)])
def test_bursts_that_are_none_are_refused(lasting: float, factor: float):
    with pytest.raises(ValueError, match="cannot have"):
        Bursts(LARGE, 10.0, lasting, factor)


def test_tenants_ask_at_the_same_time_for_adapters_of_their_own():
    light, flood = Synthetic(1.0, 20.0, 3, seed=1), Synthetic(9.0, 10.0, 4, seed=2)
    both = Tenants((("light", light), ("flood", flood)))
    requests = both.requests()
    assert (both.adapters, both.duration, len(requests)) == (7, 20.0, 110)
    assert [one.at for one in requests] == sorted(one.at for one in requests)
    asked = {
        tenant: {one.adapter for one in requests if one.tenant == tenant} for tenant, _ in both.of
    }
    assert asked == {"light": {0, 1, 2}, "flood": {3, 4, 5, 6}}
    # As each of them asks alone.
    alone = [replace(one, tenant="light") for one in light.requests()]
    assert [one for one in requests if one.tenant == "light"] == alone


def test_traffic_shifts_from_one_workload_to_another():
    first = Synthetic(2.0, 10.0, 500, prompt_tokens=(8, 16))
    then = Synthetic(5.0, 4.0, 3, prompt_tokens=(100, 200))
    shift = Shift(first, then)
    requests = shift.requests()
    assert (shift.adapters, shift.duration, len(requests)) == (500, 14.0, 40)
    assert [one.at for one in requests] == sorted(one.at for one in requests)
    late = [one for one in requests if one.prompt_tokens >= 100]
    assert len(late) == 20
    assert all(one.at > 10.0 and one.adapter in (0, 1, 2) for one in late)
