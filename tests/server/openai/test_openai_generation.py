"""The bridge to the engine: a client that leaves frees everything it asked for."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from starlette.requests import ClientDisconnect

from polydelta.adapters_store.leases import Lease
from polydelta.engine.request import (
    FinishReason,
    GenerationRequest,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from polydelta.server.errors import ApiError
from polydelta.server.openai.generation import CLIENT_GONE, MOST_WAITING, Generation
from polydelta.server.tenants.limits import Budget
from polydelta.server.tenants.tenant import OPERATOR

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"prompt": ["a", "b"]}


class Client:
    """A raw ASGI client that can hang up at any moment."""

    def __init__(self, app, path, body, spec_version="2.3"):
        self.sent = []
        self.gone = asyncio.Event()
        self._body = json.dumps({"model": "dates"} | body).encode()
        self._read = False
        # What ASGI asks of servers from 2.4 on; before, they swallowed it.
        self._raises = spec_version >= "2.4"
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.call = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self):
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if self.gone.is_set() and self._raises:
            raise OSError("the connection is closed")
        self.sent.append(message)


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize(
    ("path", "body", "choices"),
    [("/v1/chat/completions", CHAT | {"n": 3}, 3), ("/v1/completions", COMPLETION | {"n": 2}, 4)],
)
def test_hanging_up_in_mid_stream_aborts_every_choice(
    app, engine, path, body, choices, spec_version
):
    engine.endless = True

    async def scenario():
        client = Client(app, path, body | {"stream": True}, spec_version)
        await until(lambda: len(client.sent) > 10)
        assert engine.aborted == set()
        client.gone.set()
        await asyncio.wait([client.call], timeout=5)
        assert isinstance(client.call.exception(), ClientDisconnect | None)

    asyncio.run(scenario())
    assert len(engine.requests) == choices
    assert engine.aborted == {request.request_id for request in engine.requests}


@pytest.mark.parametrize(
    ("path", "body", "choices"),
    [("/v1/chat/completions", CHAT | {"n": 3}, 3), ("/v1/completions", COMPLETION, 2)],
)
def test_hanging_up_before_a_whole_body_aborts_every_choice(app, engine, path, body, choices):
    engine.endless = True

    async def scenario():
        client = Client(app, path, body)
        await until(lambda: len(engine.requests) == choices)
        client.gone.set()
        await asyncio.wait([client.call], timeout=5)
        assert client.call.exception() is None

    asyncio.run(scenario())
    assert engine.aborted == {request.request_id for request in engine.requests}


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_hanging_up_before_a_stream_has_begun_aborts_every_choice(app, engine, spec_version):
    """While its requests wait in the queue, that is: nothing is sent before."""
    engine.submit = lambda request, _: engine.requests.append(request)

    async def scenario():
        body = COMPLETION | {"n": 2, "stream": True, "echo": True}
        client = Client(app, "/v1/completions", body, spec_version)
        await until(lambda: len(engine.requests) == 4)
        await asyncio.sleep(0.05)
        assert client.sent == []
        client.gone.set()
        await asyncio.wait([client.call], timeout=5)
        assert isinstance(client.call.exception(), OSError | None)
        return client.sent

    sent = asyncio.run(scenario())
    assert {message.get("status", CLIENT_GONE) for message in sent} <= {CLIENT_GONE}
    assert engine.aborted == {request.request_id for request in engine.requests}


def test_a_cancelled_handler_aborts(app, engine):
    engine.endless = True

    async def scenario():
        client = Client(app, "/v1/completions", COMPLETION)
        await until(lambda: len(engine.requests) == 2)
        client.call.cancel()
        await asyncio.wait([client.call], timeout=5)

    asyncio.run(scenario())
    assert len(engine.aborted) == 2


def test_what_has_finished_is_not_aborted(complete, stream, engine):
    complete(n=3)
    stream("/v1/completions", n=3)
    assert engine.aborted == set()


def test_an_engine_that_dies_between_two_choices_is_503_and_the_first_is_aborted(refusal, engine):
    submit = engine.submit

    def submit_once(request, on_output):
        submit(request, on_output)
        engine.alive = False

    engine.submit = submit_once
    engine.endless = True
    status, _ = refusal("/v1/completions", n=2)
    assert status == 503
    assert engine.aborted == {engine.requests[0].request_id}


def test_hundred_requests_at_once_get_their_own_answers(app, engine):
    engine.answer = lambda request: bytes(request.prompt_token_ids).decode()

    async def scenario():
        clients = [
            Client(app, "/v1/completions", {"prompt": f"number {i}", "stream": i % 2 == 0})
            for i in range(100)
        ]
        await asyncio.wait_for(asyncio.gather(*(client.call for client in clients)), 30)
        return [b"".join(m.get("body", b"") for m in client.sent) for client in clients]

    for index, body in enumerate(asyncio.run(scenario())):
        if index % 2:
            assert json.loads(body)["choices"][0]["text"] == f"number {index}"
        else:
            events = [line.removeprefix("data: ") for line in body.decode().split("\n\n")[:-2]]
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
            assert text == f"number {index}"


def test_the_loop_is_woken_for_a_whole_body_only_when_it_is_whole(app, engine):
    """And for a stream with every token: waking it is what costs."""

    async def wakes(stream):
        loop, woken = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe

        def counted(callback, *arguments):
            woken.append(callback.__name__)
            return call(callback, *arguments)

        loop.call_soon_threadsafe = counted
        await Client(app, "/v1/completions", {"prompt": "a", "stream": stream}).call
        return woken.count("_tell")

    assert asyncio.run(wakes(stream=False)) == 1
    assert asyncio.run(wakes(stream=True)) == len("Hello")


def test_what_waits_for_a_slow_client_is_put_together_and_none_of_it_is_lost():
    """Three choices of one request, of which one fails at last, and nobody takes anything."""
    count, handlers = 2 * MOST_WAITING + 37, []
    taker = SimpleNamespace(
        submit=lambda request, on_output: handlers.append(on_output), abort=lambda _: None
    )
    requests = [GenerationRequest(f"r{number}", (1,), SamplingParams()) for number in range(3)]
    taker.alive = True

    async def scenario():
        lease = Lease("base", (), (), lambda: None)
        budget = Budget(OPERATOR)
        with Generation(taker, requests, lease, budget, streamed=True) as generation:
            for number in range(count):
                for choice in (0, 1, 2):
                    token = TokenLogprob(number, -1.0, ())
                    output = RequestOutput("", f"{choice}.{number} ", (number,), (token,))
                    handlers[choice](output)
                assert len(generation._arrived) <= MOST_WAITING
            for choice, end in enumerate(("LENGTH", "STOP", "ERROR")):
                handlers[choice](RequestOutput("", "", (), finish_reason=FinishReason[end]))
            taken = await generation.take()
            for choice in (0, 1, 2):
                mine = [output for index, output in taken if index == choice]
                whole = "".join(output.text for output in mine)
                assert whole == "".join(f"{choice}.{number} " for number in range(count))
                numbers = [token for output in mine for token in output.token_ids]
                assert numbers == list(range(count))
                assert [one.token_id for output in mine for one in output.logprobs] == numbers
            ends = [output.finish_reason for _, output in taken if output.finished]
            assert ends == [FinishReason.LENGTH, FinishReason.STOP]
            with pytest.raises(ApiError):
                await generation.take()

    asyncio.run(scenario())
