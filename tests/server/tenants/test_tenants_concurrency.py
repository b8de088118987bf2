"""The choices that a tenant may have at a time, and how their room is given back."""

from __future__ import annotations

import asyncio
import json

import pytest

from polydelta.engine.request import ErrorKind

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TENANTS = {
    "busy": {"keys": ["sk-busy"], "max_concurrent": 2, "adapters": ["*"]},
    "other": {"keys": ["sk-other"], "max_concurrent": 1},
}


class Call:
    """A request to the application, of a client that can hang up at any moment."""

    def __init__(self, app, key="busy", path=COMPLETIONS, **fields):
        self.messages = []
        self._gone = asyncio.Event()
        prompt = {"prompt": "Hi"}
        if path == CHAT:
            prompt = {"messages": [{"role": "user", "content": "Hi"}]}
        body = json.dumps({"model": "fake-base"} | prompt | fields).encode()
        self._incoming = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"content-type", b"application/json"),
                (b"authorization", f"Bearer sk-{key}".encode()),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._incoming:
            return self._incoming.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if self._gone.is_set():
            raise OSError("the connection is closed")
        self.messages.append(message)

    async def begun(self):
        await until(lambda: self.messages)

    async def answer(self):
        """Status and headers, once it is whole."""
        await self.task
        start = self.messages[0]
        return start["status"], {name.decode(): value.decode() for name, value in start["headers"]}

    async def hang_up(self):
        self._gone.set()
        await asyncio.gather(self.task, return_exceptions=True)

    async def cut_off(self):
        """As the server does with who is left at its end."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


@pytest.fixture
def busy_app(make_app):
    return make_app(tenants=json.dumps(TENANTS))


async def all_room_is_free(app):
    """Two choices of the tenant's fit at the same time."""
    status, _ = await Call(app, n=2).answer()
    return status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_more_at_a_time_are_429_and_others_do_not_notice(busy_app, engine, path, stream):
    async def scenario():
        engine.endless = True
        first = Call(busy_app, path=path, stream=stream)
        await until(lambda: len(engine.requests) == 1)
        engine.endless = False
        status, headers = await Call(busy_app, path=path, n=2, stream=stream).answer()
        assert (status, headers["retry-after"]) == (429, "1")
        assert (await Call(busy_app, path=path, stream=stream).answer())[0] == 200
        assert (await Call(busy_app, key="other", path=path).answer())[0] == 200
        await first.hang_up()
        assert await all_room_is_free(busy_app)

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["hang_up", "cut_off"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_whoever_leaves_gives_the_room_back(busy_app, engine, path, stream, end):
    async def scenario():
        for _ in range(3):
            engine.endless = True
            engine.requests.clear()
            call = Call(busy_app, path=path, n=2, stream=stream, model="dates")
            await until(lambda: len(engine.requests) == 2)
            if stream:
                await call.begun()
            engine.endless = False
            assert (await Call(busy_app).answer())[0] == 429
            await getattr(call, end)()
            assert await all_room_is_free(busy_app)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("kind", list(ErrorKind))
def test_a_failure_gives_the_room_back(busy_app, engine, kind, after, stream):
    async def scenario():
        for _ in range(3):
            engine.error, engine.error_kind, engine.error_after = "no", kind, after
            await Call(busy_app, n=2, stream=stream).task
            engine.error = None
            assert await all_room_is_free(busy_app)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_has_stopped_gives_the_room_back(busy_app, engine, monkeypatch, stream):
    """Its end comes between the look whether it lives and the submitting of the second choice."""
    submit = engine.submit

    def dying(request, on_output):
        engine.alive = request.request_id.endswith("-0")
        submit(request, on_output)

    async def scenario():
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(engine, "submit", dying)
                assert (await Call(busy_app, n=2, stream=stream).answer())[0] == 503
            engine.alive = True
            assert await all_room_is_free(busy_app)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "nobody"}, 404),
        ({"max_tokens": 10_000}, 400),
        ({"prompt": "x" * 100}, 400),
        ({"n": 3}, 400),
        ({"priority": -1}, 400),
    ],
)
def test_what_is_refused_before_takes_no_room(busy_app, fields, expected):
    async def scenario():
        for stream in (False, True):
            assert (await Call(busy_app, **fields, stream=stream).answer())[0] == expected
            assert await all_room_is_free(busy_app)

    asyncio.run(scenario())


def test_a_refusal_for_lack_of_room_leaves_the_adapter_to_be_deleted(busy_app, engine, store):
    async def scenario():
        engine.endless = True
        call = Call(busy_app, n=2)
        await until(lambda: len(engine.requests) == 2)
        assert (await Call(busy_app, model="dates").answer())[0] == 429
        assert store._leases.users(store.resolve("dates")) == 0
        await call.hang_up()

    asyncio.run(scenario())
