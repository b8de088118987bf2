"""A request's answer does not depend on who shares its batch, nor on what memory ran short."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
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
# Requests of the base beside the first one.
BESIDE = 5


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


def ask(
    catalog: FolderCatalog,
    number: int,
    name: str | None,
    prompt: Sequence[int],
    max_tokens: int,
    seeded: bool,
) -> GenerationRequest:
    """name: of an adapter, None for the base, or SUM.

    What is drawn is one of 20 tokens. Of all that the random model finds likely, the thresholds
    are 1e-4 apart: one was 2e-9 from the number that was drawn, and rounding in float32 moves them
    by 5e-9."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if seeded else 0.0,
        top_k=20 if seeded else 0,
        top_p=0.9 if seeded else 1.0,
        seed=number,
        ignore_eos=True,
    )
    shares = WEIGHTS if name == SUM else {name: 1.0} if name else {}
    adapters = combine(Share(catalog.resolve(one), weight) for one, weight in shares.items())
    return GenerationRequest(f"request-{number}", prompt, params, adapters)


def make_first(catalog: FolderCatalog, seeded: bool = False) -> list[GenerationRequest]:
    """One of `lora-40`, and others of the base that end before it does. With 7 tokens they enter
    with a page each. All do within 3 steps: when the first one of the base has all of its 41
    tokens, the others have 37 at least, which take 3 pages each."""
    chance = random.Random(7)
    requests = []
    for number in range(REQUESTS, REQUESTS + 1 + BESIDE):
        name, max_tokens = ("lora-40", 48) if number == REQUESTS else (None, 34)
        prompt = [chance.randrange(3, 40000) for _ in range(7)]
        requests.append(ask(catalog, number, name, prompt, max_tokens, seeded))
    return requests


def make_others(
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
        length = chance.randrange(max_tokens // 2, max_tokens)
        requests.append(ask(catalog, number, name, prompt, length, seeded))
    return requests


def submit_crowded(
    engine: Engine, first: Sequence[GenerationRequest], others: Sequence[GenerationRequest]
) -> dict[str, list[int]]:
    """Tokens by request id. Those beside the first one are there when it has one token, the others
    come little by little when all of these have one."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in (*first, *others)}
    begun, left, queued = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def take(output: RequestOutput) -> None:
        assert output.error is None
        if not tokens[output.request_id]:
            begun.release()
        tokens[output.request_id] += output.token_ids
        # On the engine's thread, which makes no step until then.
        assert queued.wait(300)
        if output.finished:
            left.release()

    engine.submit(first[0], take)
    assert begun.acquire(timeout=300)
    for request in first[1:]:
        engine.submit(request, take)
    queued.set()
    for _ in first[1:]:
        assert begun.acquire(timeout=300)
    for number, request in enumerate(others):
        engine.submit(request, take)
        if number % 5 == 4:
            time.sleep(0.02)
    for _ in tokens:
        assert left.acquire(timeout=300)
    return tokens


def assert_too_small(engine: Engine, pages: int) -> None:
    """A pool of so many pages must preempt and evict, whatever is slow: by counting, with the sizes
    that adapters have in the engine's pool, which holds them all."""
    sizes = {adapter.id: adapter.pages for adapter in engine.stats().resident}
    assert sizes.keys() == set(ADAPTERS)
    # All of them enter, and none leaves but by eviction.
    assert sum(sizes.values()) > pages
    # Beside `lora-40`, which stays as long as its request runs, the first requests have room to
    # enter, with a page each, but those of the base none for the 3 pages that each comes to.
    assert 1 + BESIDE <= pages - sizes["lora-40"] < 3 * BESIDE


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
    catalog = FolderCatalog([write_adapters(adapter_writer, tiny_checkpoint)])
    first, others = make_first(catalog, seeded), make_others(catalog, 60, 40, seeded)
    # The adapters take 93, lora-40 alone 58; the largest of its requests 10 more.
    pages = 70
    with serve(tiny_checkpoint) as engine:
        alone = {r.request_id: run(engine, [r])[r.request_id].token_ids for r in (*first, *others)}
        assert engine.stats().preemptions == 0
        assert_too_small(engine, pages)
    # 3 layers of 2,560-byte pages.
    with serve(
        tiny_checkpoint,
        pool_bytes=pages * 3 * 2560,
        max_batch_tokens=24,
        max_batch_size=10,
        steps_ahead=steps_ahead,
    ) as engine:
        together = submit_crowded(engine, first, others)
        stats = engine.stats()
    assert stats.preemptions > 0, "the pool was not small enough to preempt"
    assert stats.adapter_evictions > 0, "the pool was not small enough to evict adapters"
    assert together == alone


@pytest.mark.slow
@pytest.mark.long
def test_the_default_model_answers_alike_alone_and_in_a_crowd(
    default_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    catalog = FolderCatalog([write_adapters(adapter_writer, default_checkpoint)])
    first, others = make_first(catalog), make_others(catalog, 40, 24)
    # The adapters take 105, lora-40 alone 67; the largest of its requests 7 more.
    pages = 75
    with serve(default_checkpoint, pool_bytes=1 << 30) as engine:
        alone = {r.request_id: run(engine, [r])[r.request_id].token_ids for r in (*first, *others)}
        assert_too_small(engine, pages)
    # 30 layers of 24,576-byte pages. In the order of arrival, as adapters that take turns leave
    # more room.
    with serve(
        default_checkpoint,
        pool_bytes=pages * 30 * 24576,
        max_batch_tokens=40,
        max_batch_size=12,
        scheduling_policy="fcfs",
    ) as engine:
        together = submit_crowded(engine, first, others)
        stats = engine.stats()
    assert stats.preemptions > 0, "the pool was not small enough to preempt"
    assert stats.adapter_evictions > 0, "the pool was not small enough to evict adapters"
    assert together == alone
