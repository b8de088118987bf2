"""A server that is to stop finishes what it has begun, and takes nothing new."""

from __future__ import annotations

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polydelta.server.errors import error_response
from polydelta.server.lifecycle import PROBES, Lifecycle, State
from polydelta.server.unavailable import HEADERS, refuse


class Draining:
    """ASGI middleware: counts what is under way, and refuses what comes after a stop was asked
    for."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._lifecycle.ending and scope["path"] not in PROBES:
            refusal = error_response(
                503, "The server is about to stop and takes no new requests.", headers=HEADERS
            )
            await refuse(refusal, scope, receive, send)
        else:
            self._lifecycle.in_flight += 1
            try:
                await self._answer(scope, receive, send)
            finally:
                self._lifecycle.in_flight -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start" and self._lifecycle.ending:
                # The client's next request goes where there may be another server.
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            # The end of the server cuts off whoever still sends, or does not take its answer.
            if self._lifecycle.state is not State.STOPPED:
                raise
            if not started:
                await error_response(503, "The server has stopped.")(scope, receive, watched)
