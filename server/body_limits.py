"""Bodies as they come in: how long they may be, and how long a client may fall silent in one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polydelta.server.errors import ApiError, error_response
from polydelta.server.openai.generation import CLIENT_GONE

# How long a client may send nothing in the middle of a body.
IDLE_SECONDS = 60.0
# As long as the longest request that makes sense: 1024 prompts, which is the most, of 8192 token
# ids, each with six digits, a comma and a space. More than that is hours of work, and to parse it
# holds up everybody else for seconds.
MAX_BODY_BYTES = 64 << 20

# These routes read the body themselves: it can be an upload, whose limits are others.
_READS_ITSELF = re.compile(r"/v1/adapters(/[^/]*)?")


async def read_chunks(
    request: Request, idle_seconds: float = IDLE_SECONDS
) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises ApiError when the client hangs up or falls asleep."""
    async with aclosing(request.stream()) as chunks:
        while True:
            try:
                async with asyncio.timeout(idle_seconds):
                    chunk = await anext(chunks, b"")
            except ClientDisconnect:
                raise ApiError(CLIENT_GONE, "The client hung up.") from None
            except TimeoutError:
                raise ApiError(
                    408, f"Nothing came for {idle_seconds:g} seconds: send the request again."
                ) from None
            if not chunk:
                return
            yield chunk


async def read_body(request: Request, max_bytes: int, idle_seconds: float = IDLE_SECONDS) -> bytes:
    """The whole body. Raises ApiError, as `read_chunks` does and when it is too long."""
    too_long = ApiError(413, f"The body is longer than {max_bytes} bytes, which is the most.")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_long
    content = bytearray()
    async with aclosing(read_chunks(request, idle_seconds)) as chunks:
        async for chunk in chunks:
            content += chunk
            if len(content) > max_bytes:
                raise too_long
    return bytes(content)


class BodyLimits:
    """ASGI middleware: FastAPI reads bodies without limits, so it gets those that were read."""

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int = MAX_BODY_BYTES,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._idle_seconds = idle_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _READS_ITSELF.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            body = await read_body(request, self._max_bytes, self._idle_seconds)
        except ApiError as error:
            # A client that sleeps in the middle of a request can begin no other one.
            headers = {"Connection": "close"} if error.status == 408 else None
            refusal = error_response(error.status, error.message, headers=headers)
            await refusal(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receives a body that was read, then what comes after it."""
    ahead: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replaying() -> Message:
        return ahead.pop() if ahead else await receive()

    return replaying
