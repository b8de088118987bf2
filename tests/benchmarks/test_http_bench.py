"""The HTTP benchmark against servers of several kinds, none of which has a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest

from benchmarks.http_bench import learn_dialect, measure, served_models
from benchmarks.http_client import Answer, Endpoint
from benchmarks.http_work import Dialect, Prompts, Result, Work, percentiles

Respond = Callable[[dict[str, Any]], tuple[int, str | list[str]]]


def work(**changes: Any) -> Work:
    fields = {"models": ["base", "dates"], "requests": 7, "concurrency": 3, "prompt_tokens": 5}
    return Work(**(fields | {"max_tokens": 4, "stream": False, "seed": 0} | changes))


def usage(prompt: int = 5, completion: int = 4) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def with_server(
    respond: Respond, use: Callable[[Endpoint], Awaitable[Any]], missing: int = 0
) -> Any:
    """respond: body of a request -> status and body; a list of pieces is sent in chunks.
    missing: bytes that the head promises and that never come."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        status, answer = respond(json.loads(body) if body else {})
        if isinstance(answer, str):
            head_out = f"HTTP/1.1 {status} X\r\nContent-Length: {len(answer) + missing}\r\n\r\n"
            writer.write((head_out + answer).encode())
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for piece in answer:
                writer.write(f"{len(piece):x}\r\n{piece}\r\n".encode())
                await writer.drain()
                await asyncio.sleep(0.002)
            writer.write(b"0\r\n\r\n")
        writer.close()

    async def scenario() -> Any:
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await use(Endpoint(f"http://127.0.0.1:{port}/v1"))

    return asyncio.run(scenario())


def test_every_request_is_counted_and_models_take_turns():
    asked: list[dict[str, Any]] = []

    def respond(body: dict[str, Any]) -> tuple[int, str]:
        asked.append(body)
        return 200, json.dumps(usage())

    dialect, result = with_server(respond, lambda endpoint: measure(endpoint, work()))
    assert dialect == Dialect(token_ids=True, ignore_eos=True)
    counted = asked[-7:]
    assert sorted(body["model"] for body in counted) == ["base"] * 4 + ["dates"] * 3
    assert result.output_tokens == 28
    assert result.prompt_tokens == 35
    assert len(result.latency) == 7
    assert result.errors == []
    prompts = [tuple(body["prompt"]) for body in asked]
    assert len(set(prompts)) == len(prompts) == 1 + 3 + 7
    assert all(body["temperature"] == 0.0 and body["ignore_eos"] for body in asked)


def test_a_server_that_takes_neither_token_ids_nor_ignore_eos_is_asked_without():
    def respond(body: dict[str, Any]) -> tuple[int, str]:
        if not isinstance(body["prompt"], str) or "ignore_eos" in body:
            return 422, "no such field"
        return 200, json.dumps(usage(prompt=2 * len(body["prompt"].split()), completion=1))

    dialect, result = with_server(respond, lambda endpoint: measure(endpoint, work()))
    assert dialect == Dialect(token_ids=False, ignore_eos=False, words=0.5)
    # Half a word for each token that is wanted, to even.
    assert result.prompt_tokens == 7 * 4
    assert result.output_tokens == 7


def test_a_server_that_takes_nothing_is_told_with_its_reason():
    with pytest.raises(RuntimeError, match="404: there is no model"):
        with_server(
            lambda _: (404, "there is no model"),
            lambda endpoint: learn_dialect(endpoint, work(), Random(0)),
        )


def test_a_stream_has_a_first_token_gaps_and_its_usage():
    def event(fields: dict[str, Any]) -> str:
        return f"data: {json.dumps(fields)}\n\n"

    texts = [event({"choices": [{"text": text}], "usage": None}) for text in ("a", "", "b", "c")]
    last = event({"choices": [], **usage(completion=4)}) + "data: [DONE]\n\n"
    # An event may come in two pieces, and two in one.
    pieces = [texts[0][:9], texts[0][9:], texts[1], texts[2] + texts[3], last]

    def respond(body: dict[str, Any]) -> tuple[int, list[str]]:
        assert body["stream_options"] == {"include_usage": True}
        return 200, pieces

    _, result = with_server(respond, lambda endpoint: measure(endpoint, work(stream=True)))
    assert result.output_tokens == 28
    assert len(result.first_token) == 7
    assert len(result.token_gaps) == 14
    assert all(
        0 < first < whole for first, whole in zip(result.first_token, result.latency, strict=True)
    )


def test_failures_are_counted_and_do_not_end_the_run():
    turns = iter(range(100))

    def respond(_: dict[str, Any]) -> tuple[int, str]:
        turn = next(turns)
        if turn < 4:  # the question for the dialect, and the warm-up
            return 200, json.dumps(usage())
        return [(200, json.dumps(usage())), (500, "broken"), (200, "{"), (200, "{}")][turn % 4]

    _, result = with_server(respond, lambda endpoint: measure(endpoint, work(requests=8)))
    assert len(result.latency) == 2
    assert len(result.errors) == 6
    assert "500: broken" in result.errors
    assert result.to_json()["errors"] == 6


def test_an_error_event_makes_the_stream_a_failure():
    answer = Answer(
        0.0, 200, [(0.5, b'data: {"error": {"message": "no room"}}\n\ndata: [DONE]\n\n')]
    )
    with pytest.raises(ValueError, match="no room"):
        Result().add(answer, stream=True)


def test_a_server_that_hangs_up_in_mid_answer_is_a_connection_error():
    async def use(endpoint: Endpoint) -> None:
        with pytest.raises(ConnectionError):
            await endpoint.get("/v1/models")

    with_server(lambda _: (200, "{}"), use, missing=1)


def test_the_models_that_a_server_lists():
    listing = json.dumps({"data": [{"id": "base"}, {"id": "dates"}]})
    assert with_server(lambda _: (200, listing), served_models) == ["base", "dates"]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://"])
def test_what_is_no_url_is_refused(url: str):
    with pytest.raises(ValueError, match="not the URL"):
        Endpoint(url)


def test_the_same_seed_gives_the_same_prompts():
    first, second = (Prompts(work(), Dialect(), Random(3)) for _ in range(2))
    assert first.body("base") == second.body("base")
    assert first.body("base") != first.body("base")


def test_percentiles_are_in_milliseconds_by_nearest_rank():
    assert percentiles([]) is None
    assert percentiles([0.002]) == {"mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0}
    hundred = percentiles([place / 1000 for place in range(1, 101)])
    assert hundred == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p99": 99.0}
