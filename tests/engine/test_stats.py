"""What the engine tells of itself."""

from __future__ import annotations

from typing import Any

import pytest

# The class `World` of conftest.py. Each step checks that pages by owner add up to all of them.
Worlds = Any


def test_prompt_and_generated_tokens_are_counted_once_each(world: Worlds) -> None:
    w = world(max_batch_tokens=5)
    w.submit(range(12), max_tokens=4)
    w.submit(range(20, 23), max_tokens=2)
    w.drain()
    assert (w.stats().prompt_tokens, w.stats().generation_tokens) == (15, 6)


def test_prompt_tokens_from_the_prefix_cache_are_counted_as_hits(world: Worlds) -> None:
    w = world()
    for _ in range(2):
        w.submit(range(9))
        w.drain()
    now = w.stats()
    # What clients are told of their prompts, not what was computed of them.
    assert (now.prompt_tokens, now.prefix_queries, now.prefix_hits) == (18, 18, 8)
    assert now.steps.computed == {"prefill": 9 + 1, "decode": 0}


def test_recomputed_output_is_neither_prompt_nor_generated_again(world: Worlds) -> None:
    w = world(num_pages=4, prefix_caching=False)
    w.submit(range(7), max_tokens=6)
    w.submit(range(20, 27), max_tokens=6)
    w.drain()
    now = w.stats()
    assert now.preemptions > 0
    assert (now.prompt_tokens, now.generation_tokens) == (14, 12)
    assert sum(now.steps.computed.values()) > 14 + 12 - 2
    assert now.requests["request_num_preemptions"].total == now.preemptions


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
    now = w.stats()
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
    now = w.stats()
    assert (now.pages_kv, now.pages_cached) == (2, 2)
    assert (now.pages_adapters, now.pages_adapters_idle) == (2, 3)
    assert (now.pages_free, now.pages_total) == (11, 20)
    assert now.kv_usage == 2 / 20
    assert (now.adapter_loads, now.adapter_evictions) == (2, 0)
    assert {(a.id, a.version, a.pages) for a in now.resident} == {("idle", 1, 3), ("busy", 1, 2)}


@pytest.mark.parametrize(("adapter_share", "tokens"), [(None, 28), (0.5, 16), (0.6, 12)])
def test_tokens_of_kv_are_those_that_adapters_leave(
    world: Worlds, adapter_share: float | None, tokens: int
) -> None:
    w = world(num_pages=7, block_size=4, adapter_share=adapter_share)
    assert (w.stats().block_size, w.stats().kv_tokens) == (4, tokens)


def test_evictions_are_told_by_kind_and_reason(world: Worlds) -> None:
    w = world(num_pages=6, block_size=4, adapters={"a": 3, "b": 3, "c": 2})
    for adapter in ("a", "b", "c"):
        w.submit(range(5), adapter)
        w.drain()
    assert w.stats().adapter_evictions_by_reason["room"] > 0
    assert w.stats().prefix_evictions_by_reason["room"] > 0
    w.evict("c")
    assert w.stats().adapter_evictions_by_reason["ordered"] == 1
    w.submit(range(5), "b")
    w.drain()
    w.forget("b")
    now = w.stats()
    assert now.adapter_evictions_by_reason["deleted"] == 1
    assert now.prefix_evictions_by_reason["deleted"] == 1
    swap_outs = now.usage.total().swap_outs
    assert swap_outs == now.adapter_evictions == now.adapter_loads


def test_requests_are_counted_for_their_adapters_and_the_base_for_itself(world: Worlds) -> None:
    w = world(adapters={"a": 1, "b": 1})
    for adapter in ("a", None, "a", "a+b"):
        w.submit(range(7), adapter, max_tokens=3)
        w.drain()
    named = w.stats().usage.named
    assert {name: counts.requests for name, counts in named.items()} == {"a": 3, "": 1, "b": 1}
    assert {name: counts.hits for name, counts in named.items()} == {"a": 1, "": 1, "b": 0}
    assert [named[name].generation_tokens for name in ("a", "b", "")] == [9, 3, 3]
    assert [named[name].prompt_tokens for name in ("a", "b", "")] == [21, 7, 7]
    assert [named[name].swap_ins for name in ("a", "b", "")] == [1, 1, 0]
    # The first with a, and the sum, of which b was missing.
    assert w.stats().cold_starts == 2


def test_requests_are_counted_by_how_they_ended(world: Worlds) -> None:
    w = world()
    for length in (3, 4):
        w.submit(range(length), max_tokens=length)
    w.drain()
    assert w.stats().finished == {"stop": 0, "length": 2, "abort": 0, "error": 0}


def test_distributions_have_each_request_and_each_gap_once(world: Worlds) -> None:
    w = world(max_batch_tokens=6)
    for length in (3, 11):
        w.submit(range(length), max_tokens=length)
    w.drain()
    found = w.stats().requests
    assert found["inter_token_latency_seconds"].num == 2 + 10
    assert {one.num for name, one in found.items() if name != "inter_token_latency_seconds"} == {2}
    assert found["request_prompt_tokens"].total == found["request_generation_tokens"].total == 14
    queue, prefill = found["request_queue_time_seconds"], found["request_prefill_time_seconds"]
    first = found["time_to_first_token_seconds"]
    assert abs(queue.total + prefill.total - first.total) < 1e-9
    inference = found["request_inference_time_seconds"].total
    assert abs(prefill.total + found["request_decode_time_seconds"].total - inference) < 1e-9


def test_steps_are_told_by_what_is_in_them(world: Worlds) -> None:
    w = world(adapters={"a": 1, "b": 1})
    w.submit(range(5), "a+b", max_tokens=2)
    w.submit(range(7), "a", max_tokens=2)
    w.submit(range(3), max_tokens=2)
    w.drain()
    steps = w.stats().steps
    assert steps.computed == {"prefill": 15, "decode": 3}
    assert steps.tokens.total == 18
    assert steps.sequences.num == steps.adapters.num == steps.tokens.num


def test_a_load_that_fails_is_counted(world: Worlds) -> None:
    w = world(adapters={"a": 1})
    w.submit(range(5), "a")
    w.step()
    w.host.fail("a", "no such file")
    w.step()
    assert w.stats().load_failures == 1


def test_a_snapshot_does_not_change_after_it_was_taken(world: Worlds) -> None:
    w = world(adapters={"a": 1})
    before = w.stats()
    w.submit(range(9), "a", max_tokens=3)
    w.drain()
    assert before == world(adapters={"a": 1}).stats()
    assert before != w.stats()
