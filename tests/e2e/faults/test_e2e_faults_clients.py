"""Clients that leave, come by the thousand, read nothing, send half of a body or no HTTP at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, BinaryIO

import pytest

# `FaultyServer` of conftest.py.
Server = Any

PATIENCE = 60.0


def request_bytes(server: Server, model: str, **fields: Any) -> bytes:
    return post("/v1/completions", json.dumps(server.body(model, **fields)).encode())


def post(
    path: str, body: bytes, kind: str = "application/json", length: int | None = None
) -> bytes:
    """length: what the header says of the body; None for the truth."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def to(cls, server: Server) -> Connection:
        return cls(*await asyncio.open_connection(*address(server)))

    async def send(self, content: bytes) -> None:
        self._writer.write(content)
        await self._writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of an answer that tells its length."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(line for line in head.splitlines() if line.startswith("content-length:"))
        return int(head.split()[1]), await self._reader.readexactly(int(length.split(":")[1]))

    async def events(self, count: int) -> None:
        """Reads so many chunks of a stream."""
        for _ in range(count):
            await self._reader.readuntil(b"data: {")

    async def rest(self) -> bytes:
        return await self._reader.read()

    def end(self) -> None:
        """Nothing more is sent."""
        self._writer.write_eof()

    def leave(self, rudely: bool = False) -> None:
        """rudely: with a reset, at once."""
        if rudely:
            self._writer.transport.abort()
        else:
            self._writer.close()


def run(work: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await work

    return asyncio.run(bounded())


@pytest.fixture
def many_files() -> Iterator[None]:
    """A thousand sockets of our own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_200_streams_that_are_cancelled_at_any_moment(server: Server, writer: Any) -> None:
    server.install(writer.lora("own", 9, seed=8))
    chance = random.Random(4)

    async def leave(number: int) -> None:
        moment, rudely = number % 4, number % 3 == 0
        model = ("own", "steady", "tiny", "sent")[moment]
        fields = {"n": 1 + number % 5 // 4, "stream": number % 10 != 0, "max_tokens": 200}
        prompt = "Some words. " * chance.randrange(1, 25)
        connection = await Connection.to(server)
        await connection.send(request_bytes(server, model, prompt=prompt, **fields))
        if moment == 3 and fields["stream"]:  # in the decode
            await connection.events(chance.randrange(1, 40))
        else:  # in the queue, or the prefill; "own" waits for its adapter
            await asyncio.sleep(chance.uniform(0.0, 1.0))
        connection.leave(rudely)

    async def scenario() -> None:
        await asyncio.gather(*(leave(number) for number in range(200)))

    before = server.metrics().get("finished:abort", 0)
    with server.fault("wait-own"):
        run(scenario())
        server.ask("steady")
    server.rest()
    # A quarter waited for its adapter, and most of those who left in the decode had more to come.
    assert server.metrics()["finished:abort"] - before >= 70
    server.ask("own")


def test_1000_connections_at_once_all_get_an_answer(server: Server, many_files: None) -> None:
    async def ask(connection: Connection, number: int) -> str:
        model = ("tiny", "steady", "sent")[number % 3]
        await connection.send(request_bytes(server, model, max_tokens=2))
        status, body = await connection.answer()
        connection.leave()
        if status == 200:
            return str(json.loads(body)["choices"][0]["text"])
        assert status == 503, body
        assert json.loads(body)["error"]["message"]
        return "busy"

    async def scenario() -> Counter[str]:
        connections = await asyncio.gather(*(Connection.to(server) for _ in range(1000)))
        asked = (ask(connection, number) for number, connection in enumerate(connections))
        return Counter(await asyncio.gather(*asked))

    answers = run(scenario())
    wanted = {server.ask(model, max_tokens=2) for model in ("tiny", "steady", "sent")}
    assert wanted <= answers.keys() <= {*wanted, "busy"}
    assert answers.total() == 1000


def resident_bytes(server: Server) -> int:
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_clients_that_read_nothing_hold_no_pages_and_no_memory(server: Server) -> None:
    # 120 KB each, of which the system and the socket keep 90 at most.
    fields = {"n": 2, "max_tokens": 300}
    wanted = server.ask("steady", **fields)
    before = resident_bytes(server)

    with contextlib.ExitStack() as clients:
        for _ in range(6):
            narrow = clients.enter_context(socket.socket())
            narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            narrow.connect(address(server))
            narrow.sendall(request_bytes(server, "steady", stream=True, **fields))
        server.until("vllm:num_requests_running", 2)
        server.ask("tiny")
        # They end although nobody reads what they wrote.
        server.rest()
        assert resident_bytes(server) - before < 32 << 20
        # Nothing is lost for one who reads after all.
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        narrow.settimeout(PATIENCE)
        with narrow.makefile("rb") as late:
            assert text_of(late) == wanted
    # Those that left with everything unread.
    deadline = time.monotonic() + PATIENCE
    while server.http.get("/v1/adapters/steady").json()["active_requests"]:
        assert time.monotonic() < deadline


def text_of(stream: BinaryIO) -> str:
    """The texts of all choices, of a streamed answer as it comes from the socket."""
    texts: dict[int, str] = {}
    for line in stream:
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        elif line == b"data: [DONE]\n":
            return "".join(texts[index] for index in sorted(texts))
    raise AssertionError("the stream has no end")


FORM = "multipart/form-data; boundary=sep"
HALF_FORM = (
    b"--sep\r\nContent-Disposition: form-data; name=files; filename=adapter_config.json\r\n\r\n"
)
HALVES: dict[str, Callable[[Server], bytes]] = {
    "JSON": lambda server: request_bytes(server, "tiny")[:-20],
    "a form": lambda _: post("/v1/adapters", HALF_FORM + b'{"peft', FORM, 5000),
    "JSON for an adapter": lambda _: post("/v1/adapters", b'{"path"', length=500),
    "a chunk": lambda _: (
        b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        b'Transfer-Encoding: chunked\r\n\r\nff\r\n{"model"'
    ),
    "headers": lambda _: b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Le",
}


def test_half_of_a_body_and_then_nothing_or_a_hangup_is_nobody_s_loss(server: Server) -> None:
    async def scenario() -> None:
        halves = [half(server) for half in HALVES.values() for _ in range(8)]
        clients = [await Connection.to(server) for _ in halves]
        for client, half in zip(clients, halves, strict=True):
            await client.send(half)
        # They are silent now.
        await asyncio.to_thread(server.ask, "steady")
        for number, client in enumerate(clients):
            client.leave(rudely=number % 2 == 0)

    run(scenario())
    until_staging_is_empty(server)


def test_uploads_that_stop_hold_a_place_until_they_hang_up(server: Server, writer: Any) -> None:
    folder = writer.lora("bot", 2)

    async def scenario() -> None:
        clients = [await Connection.to(server) for _ in range(16)]
        for client in clients:
            await client.send(HALVES["a form"](server))
        while len(list((server.store / "staging").iterdir())) < len(clients):
            await asyncio.sleep(0.01)
        assert server.put("bot", folder).status_code == 503
        for client in clients:
            client.leave()

    run(scenario())
    # An upload's place is free a moment after its files have gone.
    deadline = time.monotonic() + PATIENCE
    while server.put("bot", folder).status_code == 503:
        assert time.monotonic() < deadline, "the places stay taken"
    until_staging_is_empty(server)
    assert server.http.delete("/v1/adapters/bot").status_code == 200


def until_staging_is_empty(server: Server) -> None:
    staging, deadline = server.store / "staging", time.monotonic() + PATIENCE
    while staging.is_dir() and any(staging.iterdir()):
        assert time.monotonic() < deadline, "an upload's files stay"
        time.sleep(0.01)


NO_HTTP = [
    b"\0" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
    b"GET /health\r\n\r\n",
    b"GET /health HTTP/9.9\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: here\r\n\r\n",
    b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET /health HTTP/1.1\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
    b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\n\r\n",
    post("/v1/completions", b"{}", length=-5),
    post("/v1/completions", b"{}").replace(b"Content-Length: 2", b"Content-Length: two"),
    post("/v1/completions", b"{}").replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n"),
    post("/v1/completions", b"zz\r\n").replace(b"Content-Length: 4", b"Transfer-Encoding: chunked"),
    post("/v1/completions", b'{"model": "tiny", "prompt": "\xff"}'),
    post("/v1/completions", b"[" * 100_000),
    b"\r\n" * 1000,
]


def test_what_is_no_http_is_refused_or_hung_up_on(server: Server) -> None:
    async def send(content: bytes) -> bytes:
        connection = await Connection.to(server)
        try:
            await connection.send(content)
            connection.end()
            return await connection.rest()
        except ConnectionError:  # the server may hang up before it has all
            return b""
        finally:
            connection.leave()

    async def scenario() -> list[bytes]:
        return await asyncio.gather(*map(send, NO_HTTP))

    for content, answer in zip(NO_HTTP, run(scenario()), strict=True):
        assert not answer.startswith(b"HTTP/1.1 5"), (content[:80], answer)
        assert b"Traceback" not in answer


def test_requests_that_come_together_are_answered_one_after_the_other(server: Server) -> None:
    models = ("tiny", "steady", "nobody", "sent")
    sent = b"".join(request_bytes(server, model, max_tokens=5) for model in models)

    async def scenario() -> list[tuple[int, bytes]]:
        connection = await Connection.to(server)
        await connection.send(sent)
        answers = [await connection.answer() for _ in models]
        # Once more, and nobody waits for it.
        await connection.send(sent)
        connection.leave(rudely=True)
        return answers

    answers = run(scenario())
    assert [status for status, _ in answers] == [200, 200, 404, 200]
    texts = [json.loads(body)["choices"][0]["text"] for status, body in answers if status == 200]
    assert texts == [server.ask(model, max_tokens=5) for model in models if model != "nobody"]
