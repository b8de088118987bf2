"""The answer of a server that takes no requests for a while."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# When a client may ask again, in seconds.
RETRY_AFTER = 5
# The next request goes where there may be another server.
HEADERS = {"Retry-After": str(RETRY_AFTER), "Connection": "close"}
# How long the body of a refused request is read, in seconds.
BODY_SECONDS = 1.0


async def refuse(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the response, which closes the connection, when the request's body has come: bytes
    that arrive at a closed connection reset it, and can take the response with them."""
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(BODY_SECONDS):
            async for _ in Request(scope, receive).stream():
                pass
    await response(scope, receive, send)
