"""A server without a model, as load tests need one."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

# Body of a request -> status and body; a list is sent as events, one after the other.
Respond = Callable[[dict[str, Any]], tuple[int, str | list[str]]]

METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="base"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="base"} 1.0
# TYPE polydelta_pool_pages gauge
polydelta_pool_pages{model_name="base",owner="kv"} 5.0
polydelta_pool_pages{model_name="base",owner="free"} 7.0
# TYPE polydelta_adapter_loads counter
polydelta_adapter_loads_total{model_name="base",tier="host"} %d.0
"""


def event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def stream(tokens: int) -> list[str]:
    """A completion with a piece of text for each token, then its usage."""
    pieces = [event({"choices": [{"text": "a"}], "usage": None}) for _ in range(tokens)]
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    return [*pieces, event({"choices": [], "usage": usage}), "data: [DONE]\n\n"]


def obey(body: dict[str, Any]) -> tuple[int, list[str]]:
    """As many tokens as are asked for."""
    return 200, stream(body["max_tokens"])


@dataclass
class FakeServer:
    """Lists a base model and adapters, has metrics, and completes as it is told to."""

    respond: Respond = obey
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"id": "base", "parent": None},
            {"id": "dates", "parent": "base"},
            {"id": "names", "parent": "base"},
        ]
    )
    url: str = ""
    # Bodies of completions, in the order in which they came.
    asked: list[dict[str, Any]] = field(default_factory=list)
    # The key of each.
    keys: list[str | None] = field(default_factory=list)
    scrapes: int = 0
    in_flight: int = 0
    most_in_flight: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        path = head.split(b" ")[1].decode()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if body:
            key = re.search(rb"Authorization: Bearer (\S+)", head)
            self.keys.append(key and key[1].decode())
        status, answer = self._answer(path, body)
        if isinstance(answer, str):
            text = answer.encode()
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n".encode())
            writer.write(text)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for piece in answer:
                writer.write(f"{len(piece):x}\r\n{piece}\r\n".encode())
                await writer.drain()
                await asyncio.sleep(0.002)
            writer.write(b"0\r\n\r\n")
        self.in_flight -= 1
        writer.close()

    def _answer(self, path: str, body: bytes) -> tuple[int, str | list[str]]:
        if path == "/v1/models":
            return 200, json.dumps({"data": self.models})
        if path == "/metrics":
            self.scrapes += 1
            return 200, METRICS % self.scrapes
        self.asked.append(json.loads(body))
        return self.respond(self.asked[-1])


@contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """On a thread of its own: what is tested may run an event loop itself."""
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        ready.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """Its `respond` may be changed."""
    with running(FakeServer()) as server:
        yield server


@pytest.fixture
def stream_of() -> Callable[[int], list[str]]:
    """tokens -> the events of a whole answer."""
    return stream
