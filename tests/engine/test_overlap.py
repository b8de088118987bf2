"""Steps that are scheduled and launched before the tokens of the one before are known."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from polydelta.engine.engine import Engine
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.request import FinishReason, GenerationRequest, SamplingParams

Serve = Callable[..., Any]
Run = Callable[..., Any]


@pytest.fixture
def overlapped(serve: Serve, tiny_checkpoint: Checkpoint) -> Callable[..., Any]:
    @contextmanager
    def start(**options: Any) -> Iterator[Engine]:
        with serve(tiny_checkpoint, steps_ahead=1, **options) as engine:
            yield engine

    return start


def requests(count: int, **params: Any) -> list[GenerationRequest]:
    chance = random.Random(3)
    return [
        GenerationRequest(
            f"request-{number}",
            [chance.randrange(3, 40000) for _ in range(chance.randrange(1, 30))],
            SamplingParams(**{"max_tokens": 5 + number, "ignore_eos": True} | params),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"temperature": 0.0}, id="greedy"),
        pytest.param({"temperature": 1.0, "seed": 7}, id="seeded"),
        pytest.param({"temperature": 0.0, "repetition_penalty": 1.7}, id="repetition penalty"),
        pytest.param(
            {"temperature": 0.0, "presence_penalty": 0.8, "frequency_penalty": 0.4}, id="penalties"
        ),
        pytest.param({"temperature": 0.0, "logprobs": 3}, id="log probabilities"),
    ],
)
def test_answers_are_those_of_one_step_at_a_time(
    params: dict[str, Any],
    overlapped: Callable[..., Any],
    serve: Serve,
    tiny_checkpoint: Checkpoint,
    run: Run,
) -> None:
    with serve(tiny_checkpoint, steps_ahead=0) as engine:
        expected = run(engine, requests(9, **params))
    with overlapped() as engine:
        got = run(engine, requests(9, **params))
    for name, answer in expected.items():
        assert got[name].token_ids == answer.token_ids
        assert [o.logprobs for o in got[name].outputs] == [o.logprobs for o in answer.outputs]
        assert got[name].finish_reason == answer.finish_reason
    assert engine.stats().finished["length"] == sum(engine.stats().finished.values()) == 9


def test_nobody_gets_a_token_after_a_stop(overlapped: Callable[..., Any], run: Run) -> None:
    plain = requests(6, temperature=0.0, max_tokens=20)
    with overlapped() as engine:
        whole = run(engine, plain)
    for place in (0, 3, 18):
        stopping = [
            GenerationRequest(
                request.request_id,
                request.prompt_token_ids,
                SamplingParams(
                    max_tokens=20,
                    temperature=0.0,
                    ignore_eos=True,
                    stop_token_ids=(whole[request.request_id].token_ids[place],),
                ),
            )
            for request in plain
        ]
        with overlapped() as engine:
            stopped = run(engine, stopping)
        stats = engine.stats()
        for request in stopping:
            tokens = whole[request.request_id].token_ids
            (stop,) = request.sampling.stop_token_ids
            assert stopped[request.request_id].finish_reason is FinishReason.STOP
            assert stopped[request.request_id].token_ids == tokens[: tokens.index(stop) + 1]
        # What a step computed for sequences that had left counts for nobody.
        assert stats.generation_tokens == sum(len(a.token_ids) for a in stopped.values())


def test_tokens_are_counted_as_clients_see_them(overlapped: Callable[..., Any], run: Run) -> None:
    with overlapped() as engine:
        asked = requests(12, temperature=0.0)
        answers = run(engine, asked)
    stats = engine.stats()
    assert [len(answers[r.request_id].token_ids) for r in asked] == list(range(5, 17))
    assert stats.generation_tokens == sum(range(5, 17))
    assert stats.prompt_tokens == sum(len(r.prompt_token_ids) for r in asked)


def test_the_context_window_is_filled_to_its_last_place(
    overlapped: Callable[..., Any], run: Run
) -> None:
    with overlapped(max_model_len=32) as engine:
        (answer,) = run(engine, requests(1, temperature=0.0, max_tokens=500)).values()
        prompt = len(requests(1)[0].prompt_token_ids)
    assert len(answer.token_ids) == 32 - prompt
    assert answer.finish_reason is FinishReason.LENGTH


def test_requests_that_are_dropped_on_their_way_leave_nothing(
    overlapped: Callable[..., Any],
) -> None:
    """The engine balances its books when it goes idle, and dies when they do not."""
    with overlapped(pool_bytes=40 * 3 * 2560, max_batch_size=6) as engine:
        began = threading.Semaphore(0)
        for request in requests(30, temperature=0.0, max_tokens=60):
            engine.submit(request, lambda _: began.release())
        for number in range(30):
            assert began.acquire(timeout=60)
            engine.abort(f"request-{number}")
        deadline = time.monotonic() + 60
        while engine.num_unfinished:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stats = engine.stats()
        assert stats.pages_kv == 0
        assert stats.pages_free + stats.pages_cached == stats.pages_total
