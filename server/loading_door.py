"""Who answers at the port while the model loads: 503 for everybody, and how far the loading is."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Self

import uvicorn
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from polydelta.server.errors import error_response
from polydelta.server.lifecycle import Lifecycle
from polydelta.server.unavailable import HEADERS, refuse

# How long requests that are on their way when the door closes are waited for, in seconds.
LAST_REQUESTS = 0.5
POLL = 0.01


class LoadingDoor:
    """Listens from entry until `close`, on a thread of its own: the main thread loads.

    bound: stays open and listening when the door has closed, so that connections which come
    before the next server listens there are not refused, but wait for it.
    """

    def __init__(self, bound: socket.socket, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
        )
        self._server = _DoorServer(config)
        # Another name of the same open socket: closing one leaves the other as it is.
        listener = bound.dup()
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="polydelta-door", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Answers whoever has come so far, and goes."""
        self._server.should_exit = True
        self._thread.join()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/ready":
            answer = JSONResponse(self._lifecycle.describe(), 503, headers=HEADERS)
        else:
            answer = error_response(
                503, f"The model is being loaded: {self._lifecycle.stage}.", headers=HEADERS
            )
        await refuse(answer, scope, receive, send)


class _DoorServer(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but for requests that are on their way, and at once when there is none."""
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        # Every answer closes its connection. The first pause is for those just accepted.
        polls = int(LAST_REQUESTS / POLL)
        for _ in range(polls):
            await asyncio.sleep(POLL)
            if not self.server_state.connections:
                return
        for connection in list(self.server_state.connections):
            connection.shutdown()
