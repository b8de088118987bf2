"""A client of OpenAI-style servers that costs little: a core that it takes, the server lacks.

An answer's bytes are kept with the times at which they came, and parsed when the clock has stopped.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from httptools import HttpResponseParser

# No request takes so many seconds unless something is wrong.
PATIENCE = 600.0


@dataclass
class Answer:
    """What came back; times are of `time.perf_counter`."""

    # When the connection was asked for.
    began: float
    status: int = 0
    # The body's pieces, each with the time at which it came.
    parts: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the request to the last byte."""
        return self.parts[-1][0] - self.began if self.parts else 0.0

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.parts)

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """The server-sent events, each with the time at which its last byte came."""
        rest = b""
        for came, data in self.parts:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                name, _, value = line.strip().partition(b":")
                if name == b"data" and value.strip() != b"[DONE]":
                    yield came, json.loads(value)


class _Exchange(asyncio.Protocol):
    """One request on a connection of its own; what httptools parses, it tells by `on_...`."""

    def __init__(self, request: bytes, answer: Answer) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._answer = answer
        self._parser = HttpResponseParser(self)
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._parser.feed_data(data)

    def connection_lost(self, problem: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(str(problem or "the server hung up")))

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._answer.parts.append((self._now, data))

    def on_message_complete(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class Endpoint:
    """One server, by its URL."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """url: with or without the `/v1` at its end."""
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the URL of a server, such as http://127.0.0.1:8000.")
        self.url = parts.geturl()
        self._host, self._port = parts.hostname, parts.port
        self._tls = parts.scheme == "https"
        self._path = parts.path
        self._headers = f"Host: {parts.netloc}\r\nConnection: close\r\n"
        if api_key is not None:
            self._headers += f"Authorization: Bearer {api_key}\r\n"

    async def get(self, path: str) -> Answer:
        return await self._exchange("GET", path, b"")

    async def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        return await self._exchange("POST", path, json.dumps(body).encode())

    async def _exchange(self, method: str, path: str, body: bytes) -> Answer:
        """Raises OSError, TimeoutError included, when no whole answer comes."""
        head = (
            f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        answer = Answer(time.perf_counter())
        async with asyncio.timeout(PATIENCE):
            transport, exchange = await asyncio.get_running_loop().create_connection(
                lambda: _Exchange(head.encode() + body, answer),
                self._host,
                self._port or (443 if self._tls else 80),
                ssl=self._tls or None,
            )
            try:
                await exchange.ended
            finally:
                transport.close()
        return answer
