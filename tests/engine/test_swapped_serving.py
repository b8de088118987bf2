"""Answers do not tell whether their KV was in host RAM for a while."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from polydelta.adapters_store.composition import Share, combine
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.preemption_mode import PreemptionMode
from polydelta.engine.request import GenerationRequest, SamplingParams

NAMES = (None, "lora", None, "shira", "lora")


def make_requests(
    writer: Callable, checkpoint: Checkpoint, count: int, max_tokens: int
) -> list[GenerationRequest]:
    """The base and two adapters in turn, greedy; some prompts begin alike."""
    write = writer(base_layout(checkpoint.config, checkpoint.id))
    write.lora("lora", 5, seed=1, scale=0.3)
    write.shira("shira", 1, targets=("k_proj", "down_proj"), seed=2, scale=0.3)
    root: Path = write.root
    catalog, chance = FolderCatalog([root]), random.Random(6)
    shared = [chance.randrange(3, 40000) for _ in range(37)]
    requests = []
    for number in range(count):
        name = NAMES[number % len(NAMES)]
        own = [chance.randrange(3, 40000) for _ in range(chance.randrange(1, 40))]
        prompt = shared + own if number % 3 else own
        params = SamplingParams(max_tokens=max_tokens + number, temperature=0.0, ignore_eos=True)
        adapters = combine([Share(catalog.resolve(name))] if name else [])
        requests.append(GenerationRequest(f"request-{number}", prompt, params, adapters))
    return requests


@pytest.mark.parametrize("steps_ahead", [0, 1], ids=["in turns", "overlapped"])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cached", "uncached"])
def test_answers_with_swapping_equal_those_without_preemption(
    prefix_caching: bool,
    steps_ahead: int,
    tiny_checkpoint: Checkpoint,
    adapter_writer: Callable,
    serve: Callable,
    run: Callable,
) -> None:
    requests = make_requests(adapter_writer, tiny_checkpoint, count=13, max_tokens=50)
    options = {
        "max_batch_tokens": 24,
        "block_size": 4,
        "steps_ahead": steps_ahead,
        "prefix_caching": prefix_caching,
    }
    with serve(tiny_checkpoint, **options) as engine:
        expected = {name: answer.token_ids for name, answer in run(engine, requests).items()}
        assert engine.stats().preemptions == 0
    # 3 layers of 640-byte pages: room for five or so of the thirteen, and in host RAM for two.
    options |= {"pool_bytes": 150 * 3 * 640, "host_kv_bytes": 40 * 3 * 640 + 1}
    with serve(tiny_checkpoint, **options) as engine:
        got = {name: answer.token_ids for name, answer in run(engine, requests).items()}
        stats = engine.stats()
    assert stats.preemptions_by_mode[PreemptionMode.SWAP] > 3
    assert sum(stats.preemptions_by_mode.values()) == stats.preemptions
    assert stats.host_kv_bytes == 0
    assert got == expected


@pytest.mark.slow
def test_the_default_model_answers_alike_with_swapping(
    default_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    requests = make_requests(adapter_writer, default_checkpoint, count=7, max_tokens=24)
    options = {"max_batch_tokens": 40, "prefix_caching": False}
    with serve(default_checkpoint, pool_bytes=1 << 30, **options) as engine:
        expected = {name: answer.token_ids for name, answer in run(engine, requests).items()}
        computed = engine.stats().steps.computed
    # 30 layers of 24,576-byte pages.
    page = 30 * 24576
    with serve(
        default_checkpoint, pool_bytes=24 * page, host_kv_bytes=50 * page, **options
    ) as engine:
        got = {name: answer.token_ids for name, answer in run(engine, requests).items()}
        stats = engine.stats()
    assert stats.preemptions_by_mode[PreemptionMode.SWAP] == stats.preemptions > 0
    assert stats.steps.computed == computed, "something was computed again"
    assert got == expected
