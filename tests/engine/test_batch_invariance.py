"""A request's answer does not depend on who shares its batch, nor on what memory ran short."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polydelta.adapters_store.composition import Share, combine
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.engine import Engine
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.request import GenerationRequest, RequestOutput, SamplingParams

SUM = "a weighted sum"
WEIGHTS = {"lora-3": 0.7, "lora-8": -0.4, "shira-b": 1.5}
ADAPTERS = ("lora-3", "lora-8", "lora-12", "lora-40", "shira-a", "shira-b")
REQUESTS = 24


def write_adapters(writer: Callable, checkpoint: Checkpoint) -> Path:
    """Four LoRAs of different rank and two SHiRAs, on different modules and layers."""
    write = writer(base_layout(checkpoint.config, checkpoint.id))
    layers = checkpoint.config.num_layers
    write.lora("lora-3", 3, seed=1, scale=0.3)
    write.lora("lora-8", 8, targets=("q_proj", "v_proj"), seed=2, scale=0.5)
    write.lora("lora-12", 12, layers=range(0, layers, 2), seed=3, scale=0.3)
    write.lora("lora-40", 40, seed=4, scale=0.3)
    write.shira("shira-a", 2, seed=5, scale=0.1)
    write.shira("shira-b", 1, targets=("k_proj", "down_proj"), seed=6, scale=0.3)
    return write.root


def make_requests(
    catalog: FolderCatalog, max_prompt: int, max_tokens: int, seeded: bool = False
) -> list[GenerationRequest]:
    """Base, every adapter and a sum of three in turn; prompts of odd lengths, some of which begin
    alike."""
    chance = random.Random(6)
    shared = [chance.randrange(3, 40000) for _ in range(max_prompt)]
    requests = []
    for number in range(REQUESTS):
        name = (None, *ADAPTERS, SUM)[number % 8]
        own = [chance.randrange(3, 40000) for _ in range(chance.randrange(1, max_prompt))]
        prompt = shared[: chance.randrange(max_prompt)] + own if number % 3 else own
        params = SamplingParams(
            max_tokens=chance.randrange(max_tokens // 2, max_tokens),
            temperature=1.0 if seeded else 0.0,
            top_p=0.9 if seeded else 1.0,
            seed=number,
            ignore_eos=True,
        )
        shares = WEIGHTS if name == SUM else {name: 1.0} if name else {}
        adapters = combine(Share(catalog.resolve(one), w) for one, w in shares.items())
        requests.append(GenerationRequest(f"request-{number}", prompt, params, adapters))
    return requests


def submit_staggered(engine: Engine, requests: list[GenerationRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    left = threading.Semaphore(0)

    def take(output: RequestOutput) -> None:
        assert output.error is None
        tokens[output.request_id] += output.token_ids
        if output.finished:
            left.release()

    for number, request in enumerate(requests):
        engine.submit(request, take)
        if number % 5 == 4:
            time.sleep(0.02)
    for _ in requests:
        assert left.acquire(timeout=300)
    return tokens


@pytest.mark.parametrize("steps_ahead", [0, 1], ids=["in turns", "overlapped"])
@pytest.mark.parametrize("seeded", [False, True], ids=["greedy", "seeded"])
def test_answers_in_a_crowded_small_pool_equal_those_given_alone(
    seeded: bool,
    steps_ahead: int,
    tiny_checkpoint: Checkpoint,
    adapter_writer: Callable,
    serve: Callable,
    run: Callable,
) -> None:
    root = write_adapters(adapter_writer, tiny_checkpoint)
    requests = make_requests(FolderCatalog([root]), 60, 40, seeded)
    with serve(tiny_checkpoint) as engine:
        alone = {r.request_id: run(engine, [r])[r.request_id].token_ids for r in requests}
        assert engine.stats().preemptions == 0
    # 3 layers of 2,560-byte pages: 80 pages, of which lora-40 alone takes 36.
    with serve(
        tiny_checkpoint,
        pool_bytes=80 * 3 * 2560,
        max_batch_tokens=24,
        max_batch_size=10,
        steps_ahead=steps_ahead,
    ) as engine:
        together = submit_staggered(engine, requests)
        stats = engine.stats()
    assert stats.preemptions > 0, "the pool was not small enough to preempt"
    assert stats.adapter_evictions > 0, "the pool was not small enough to evict adapters"
    assert together == alone


@pytest.mark.slow
def test_the_default_model_answers_alike_alone_and_in_a_crowd(
    default_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    root = write_adapters(adapter_writer, default_checkpoint)
    requests = make_requests(FolderCatalog([root]), 40, 24)
    with serve(default_checkpoint, pool_bytes=1 << 30) as engine:
        alone = {r.request_id: run(engine, [r])[r.request_id].token_ids for r in requests}
    # 30 layers of 24,576-byte pages: 130 pages, of which lora-40 alone takes 67. In the order of
    # arrival, as adapters that take turns leave enough room.
    with serve(
        default_checkpoint,
        pool_bytes=130 * 30 * 24576,
        max_batch_tokens=40,
        max_batch_size=12,
        scheduling_policy="fcfs",
    ) as engine:
        together = submit_staggered(engine, requests)
        stats = engine.stats()
    assert stats.preemptions > 0, "the pool was not small enough to preempt"
    assert stats.adapter_evictions > 0, "the pool was not small enough to evict adapters"
    assert together == alone
