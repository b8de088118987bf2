"""What the engine tells of itself."""

from __future__ import annotations

from typing import Any

from polydelta.engine.request import FinishReason
from polydelta.engine.stats import EngineStats

# The class `World` of conftest.py. Each step checks that pages by owner add up to all of them.
Worlds = Any


def stats(w: Any) -> EngineStats:
    w.recorder.refresh(w.scheduler)
    return w.recorder.snapshot


def test_prompt_and_generated_tokens_are_counted_once_each(world: Worlds) -> None:
    w = world(max_batch_tokens=5)
    w.submit(range(12), max_tokens=4)
    w.submit(range(20, 23), max_tokens=2)
    w.drain()
    assert (stats(w).prompt_tokens, stats(w).generation_tokens) == (15, 6)


def test_prompt_tokens_from_the_prefix_cache_are_counted_as_hits(world: Worlds) -> None:
    w = world()
    for _ in range(2):
        w.submit(range(9))
        w.drain()
    now = stats(w)
    assert (now.prompt_tokens, now.prefix_queries, now.prefix_hits) == (9 + 1, 18, 8)


def test_recomputed_output_is_neither_prompt_nor_generated_again(world: Worlds) -> None:
    w = world(num_pages=4, prefix_caching=False)
    w.submit(range(7), max_tokens=6)
    w.submit(range(20, 27), max_tokens=6)
    w.drain()
    now = stats(w)
    assert now.preemptions > 0
    assert (now.prompt_tokens, now.generation_tokens) == (14, 12)


def test_who_waits_for_an_adapter_is_told_from_who_waits_for_room(world: Worlds) -> None:
    w = world(max_batch_size=2, adapters={"a": 1, "b": 1})
    w.submit([1], max_tokens=9)
    w.submit([2], "a", max_tokens=9)
    w.step()
    w.host.finish()
    w.step()
    w.submit([3], "b")
    w.submit([4])
    w.step()
    now = stats(w)
    assert (now.num_running, now.num_waiting, now.waiting_for_adapter) == (2, 2, 1)
    assert (now.running_adapters, now.waiting_adapters) == (("a",), ("b",))
    assert now.resident_adapters == ("a",)


def test_pages_are_told_by_owner(world: Worlds) -> None:
    w = world(num_pages=20, block_size=4, adapters={"idle": 3, "busy": 2})
    w.submit(range(9), "idle")
    w.drain()
    w.submit(range(5), "busy", max_tokens=5)
    w.step()
    w.host.finish()
    w.step()
    now = stats(w)
    assert (now.pages_kv, now.pages_cached) == (2, 2)
    assert (now.pages_adapters, now.pages_adapters_idle) == (2, 3)
    assert (now.pages_free, now.pages_total) == (11, 20)
    assert now.kv_usage == 2 / 20
    assert (now.adapter_loads, now.adapter_evictions) == (2, 0)


def test_requests_are_counted_by_how_they_ended(world: Worlds) -> None:
    w = world()
    for reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP):
        w.recorder.finished(reason)
    assert stats(w).finished == {"stop": 2, "length": 1}


def test_a_snapshot_does_not_change_after_it_was_taken(world: Worlds) -> None:
    w = world()
    w.recorder.finished(FinishReason.STOP)
    before = stats(w)
    w.submit(range(9))
    w.drain()
    w.recorder.finished(FinishReason.STOP)
    assert before.finished == {"stop": 1}
    assert before.prompt_tokens == 0
