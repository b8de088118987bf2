"""Fairness between tenants and adapters, in steps of a scheduler over make-believe memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from polydelta.engine.policies.fair import RESIDENT_BONUS
from polydelta.engine.sequence import Sequence

Worlds = Callable[..., Any]


def steps_to_first_token(w: Any, sequence: Sequence, keep_busy: Callable[[], None]) -> int:
    for step in range(1, 500):
        keep_busy()
        w.step()
        w.host.finish()
        if sequence.num_output_tokens:
            return step
    raise AssertionError("never served")


def flood(w: Any, tenant: str, adapter: str | None, waiting: int, max_tokens: int) -> None:
    """As many requests as it takes to have so many waiting."""
    while sum(s.request.tenant == tenant for s in w.scheduler.waiting) < waiting:
        w.submit(range(20), adapter, max_tokens=max_tokens, tenant=tenant)


@pytest.mark.parametrize("answer", [5, 300], ids=["short answers", "long answers"])
@pytest.mark.parametrize("prompt", [5, 90], ids=["a short prompt", "a long prompt"])
def test_a_light_tenant_beside_a_flooding_one_has_its_first_token_within_twice_the_steps(
    world: Worlds, prompt: int, answer: int
) -> None:
    def run(flooded: bool) -> list[int]:
        w = world(
            num_pages=200,
            max_batch_tokens=30,
            max_batch_size=8,
            prefix_caching=False,
            policy="fair",
        )

        def keep_busy() -> None:
            if flooded:
                flood(w, "flooding", None, 50, answer)

        for _ in range(60 if flooded else 1):
            keep_busy()
            w.step()
        waits = []
        for _ in range(10):
            light = w.submit(range(prompt), tenant="light", max_tokens=3)
            waits.append(steps_to_first_token(w, light, keep_busy))
            for _ in range(7):
                keep_busy()
                w.step()
        return waits

    alone, flooded = run(flooded=False), run(flooded=True)
    # A step that is under way cannot be had back, so two steps are the least that can be promised.
    assert max(flooded) <= 2 * max(alone)


def test_the_light_tenant_gets_in_though_the_flood_is_first_in_line(world: Worlds) -> None:
    """The flood's adapter is in the pool, which is worth a bonus; the light one's is not, and it
    was served more before."""
    for batch in (2, 8):
        w = world(
            num_pages=200, max_batch_size=batch, policy="fair", adapters={"warm": 2, "cold": 2}
        )  # fmt: skip
        for _ in range(5):
            w.submit(range(40), "cold", tenant="light")
            w.drain()
        w.evict("cold")
        for _ in range(20):
            flood(w, "flooding", "warm", 30, 300)
            w.step()
            w.host.finish()
        light = w.submit(range(5), "cold", tenant="light")
        # One for its adapter to be loaded, one to run.
        busy = partial(flood, w, "flooding", "warm", 30, 300)
        assert steps_to_first_token(w, light, busy) <= 2


def test_a_prefix_that_a_flood_uses_too_is_not_counted_as_room(world: Worlds) -> None:
    """Making way frees the pages of those that go, but not what they share with who comes."""
    w = world(num_pages=13, block_size=4, policy="fair")
    shared = range(100, 124)
    w.submit([99] * 4, tenant="flood", max_tokens=40)
    w.step()
    w.submit(shared, tenant="flood", max_tokens=20)
    for _ in range(3):
        w.step()
    light = w.submit([*shared, *range(24)], tenant="light", max_tokens=2)
    w.drain()
    assert light in w.finished


def test_pages_that_requests_share_do_not_make_a_flood_of_them(world: Worlds) -> None:
    w = world(num_pages=60, block_size=4, max_batch_size=40, policy="fair")
    shared = range(24)
    w.submit(shared, tenant="sharing")
    w.drain()
    for number in range(6):
        w.submit([*shared, number], tenant="sharing", max_tokens=30)
    w.step()
    w.submit(range(500, 640), tenant="large", max_tokens=30)
    w.step()
    w.submit(range(900, 960), tenant="new", max_tokens=3)
    w.step()
    assert all(not s.num_preemptions for s in w.submitted if s.request.tenant == "sharing")
    w.drain()


def test_first_come_first_served_lets_the_light_one_wait_behind_the_flood(world: Worlds) -> None:
    """So that the test above tells something."""
    w = world(num_pages=200, max_batch_tokens=30, max_batch_size=8, policy="fcfs")
    flood(w, "flooding", None, 50, 5)
    light = w.submit(range(5), tenant="light")
    assert steps_to_first_token(w, light, lambda: None) > 20


def served_tokens(w: Any, of: Callable[[Sequence], str]) -> Counter[str]:
    return Counter(
        {
            name: sum(len(w.tokens[s]) for s in w.finished if of(s) == name)
            for name in {of(s) for s in w.submitted}
        }
    )


def saturate(w: Any, steps: int, submit: Callable[[int], None], each: int) -> None:
    for step in range(steps):
        for _ in range(each):
            submit(step)
        w.step()
        w.host.finish()


def test_tenants_get_tokens_in_the_ratio_of_their_weights(world: Worlds) -> None:
    w = world(num_pages=400, max_batch_size=6, policy="fair", prefix_caching=False)

    def submit(step: int) -> None:
        w.submit(range(7), tenant="small", weight=1.0, max_tokens=4)
        w.submit(range(7), tenant="large", weight=3.0, max_tokens=4)

    saturate(w, 300, submit, 3)
    tokens = served_tokens(w, lambda s: s.request.tenant)
    assert tokens["large"] / tokens["small"] == pytest.approx(3.0, rel=0.1)


def test_adapters_share_evenly_where_there_are_no_tenants_however_unevenly_they_ask(
    world: Worlds,
) -> None:
    adapters = {"busy": 1, "quiet": 1}
    w = world(num_pages=400, max_batch_size=6, policy="fair", adapters=adapters)

    def submit(step: int) -> None:
        for _ in range(9):
            w.submit(range(6), "busy", max_tokens=4)
        if step % 2:
            w.submit(range(6), "quiet", max_tokens=4)

    saturate(w, 200, submit, 1)
    tokens = served_tokens(w, lambda s: s.account)
    asked = sum(s.account == "quiet" for s in w.submitted)
    got = sum(s.account == "quiet" for s in w.finished)
    # The quiet one asks for less than half, and gets all of it at once.
    assert asked - got <= 2
    assert tokens["busy"] > tokens["quiet"]


def test_the_adapters_of_one_tenant_share_evenly_among_themselves(world: Worlds) -> None:
    w = world(num_pages=400, max_batch_size=4, policy="fair", adapters={"busy": 1, "quiet": 1})

    def submit(step: int) -> None:
        for _ in range(5):
            w.submit(range(6), "busy", max_tokens=4, tenant="t")
        w.submit(range(6), "quiet", max_tokens=4, tenant="t")
        w.submit(range(6), tenant="other", max_tokens=4)

    saturate(w, 200, submit, 1)
    finished = Counter(s.adapter_refs[0].id for s in w.finished if s.adapters)
    assert finished["quiet"] == pytest.approx(finished["busy"], rel=0.15)
    tokens = served_tokens(w, lambda s: s.request.tenant)
    assert tokens["t"] == pytest.approx(tokens["other"], rel=0.15)


def test_the_bonus_of_resident_adapters_is_bounded(world: Worlds) -> None:
    """Requests for a resident adapter get ahead of an older one for another, but only so far."""
    w = world(
        num_pages=8, max_batch_size=1, policy="fair", adapters={"here": 2, "there": 2},
        prefix_caching=False,
    )  # fmt: skip
    w.submit(range(4), "here", max_tokens=2)
    w.drain()
    w.submit(range(4), max_tokens=2)
    w.step()
    there = w.submit(range(4), "there", max_tokens=1)
    for _ in range(200):
        w.submit(range(4), "here", max_tokens=2)
    before = 0
    while there not in w.finished:
        w.step()
        w.host.finish()
        before = sum(s.account == "here" for s in w.finished)
    # Each of its requests is charged 4 + 2 * 2 tokens, or less; one was served before.
    assert 1 < before <= RESIDENT_BONUS / 6 + 2


def test_time_in_which_nothing_was_asked_is_not_saved_up(world: Worlds) -> None:
    w = world(num_pages=400, max_batch_size=4, policy="fair", prefix_caching=False)

    def only_one(step: int) -> None:
        for _ in range(2):
            w.submit(range(6), tenant="always", max_tokens=4)

    saturate(w, 200, only_one, 1)
    before = served_tokens(w, lambda s: s.request.tenant)["always"]

    def both(step: int) -> None:
        only_one(step)
        for _ in range(2):
            w.submit(range(6), tenant="late", max_tokens=4)

    saturate(w, 100, both, 1)
    tokens = served_tokens(w, lambda s: s.request.tenant)
    assert tokens["always"] - before == pytest.approx(tokens["late"], rel=0.2)
