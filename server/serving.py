"""The process around the application: a bound port, uvicorn, and an orderly stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import uvicorn

from polydelta.server.lifecycle import Lifecycle, State
from polydelta.server.settings import ServerSettings, SettingsError
from polydelta.server.stalled_connections import StalledConnections

if TYPE_CHECKING:  # the engine imports torch, which takes seconds
    from fastapi import FastAPI

    from polydelta.engine.engine import Engine

logger = logging.getLogger(__name__)

# What the engine gets to end the step at hand, in seconds.
LAST_STEP = 3.0
# What connections get to send their last bytes once the engine has stopped, in seconds.
LAST_BYTES = 3
# All of the end, when requests under way have had their time, in seconds.
LAST_SECONDS = 8.0
# uvicorn's.
TICKS_PER_SECOND = 10


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that a taken port shows before a model loads.

    Raises SettingsError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise SettingsError(
            f"Cannot listen on {host} port {port}: {error.strerror}; choose another with --port."
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    host, port = bound.getsockname()[:2]
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


class Server(uvicorn.Server):
    """uvicorn, with an end in order: what is under way may finish, then the engine stops, then
    connections are closed."""

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        settings: ServerSettings,
        lifecycle: Lifecycle,
        on_ready: Callable[[], None],
    ) -> None:
        # Warns of every malformed upload, which anybody can send.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        config = uvicorn.Config(
            app,
            log_level=settings.log_level,
            # Nothing here speaks it, and its connections are none that `stalled` could look at.
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=LAST_BYTES,
        )
        super().__init__(config)
        self.stalled = StalledConnections()
        self._engine = engine
        self._lifecycle = lifecycle
        self._grace = settings.shutdown_timeout
        # When what is under way has had its time, on the monotonic clock; None before a stop.
        self._drained_by: float | None = None
        self._on_ready = on_ready

    def serve_until_stopped(self, bound: socket.socket) -> None:
        """Starts the engine, serves until SIGINT or SIGTERM, stops the engine.

        From the stop on the process has a limited time; see `leave_after`.
        """
        # While it serves, uvicorn has both itself; afterwards it raises them again for whoever had
        # them before, when all that they ask for has been done.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        self._engine.start()
        try:
            self.run(sockets=[bound])
        finally:
            if self._lifecycle.state is not State.STOPPED:  # it did not get as far as serving
                self._engine.shutdown(LAST_STEP)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A second one, of either kind, waits for nobody.
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()
        self._lifecycle.state = State.READY

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; the server serves until this is true."""
        if counter % TICKS_PER_SECOND == 0:
            self.stalled.end(self.server_state.connections, time.monotonic())
        return await super().on_tick(counter) and self._has_drained()

    def _has_drained(self) -> bool:
        """Whether requests under way have ended or had their time, once a stop is asked for."""
        if self._drained_by is None:
            self._lifecycle.state = State.DRAINING
            self._drained_by = time.monotonic() + self._grace
        late = time.monotonic() >= self._drained_by
        return self.force_exit or late or self._lifecycle.in_flight == 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._lifecycle.state = State.STOPPED
        leave_after(LAST_SECONDS)
        for listener in self.servers:
            listener.close()
        # Requests in flight end with finish_reason "abort", and their connections can close.
        await asyncio.to_thread(self._engine.shutdown, LAST_STEP)
        await super().shutdown(sockets)


def leave_after(seconds: float) -> None:
    """Ends the process in so many seconds, if it is still there: a disk, a database or a step of
    the engine can take any time, and nobody is left to be served."""

    def end() -> None:
        logger.warning(
            "Something did not end in %g seconds; the server leaves without it.", seconds
        )
        leave()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def leave() -> NoReturn:
    """Ends the process, with code 0. The interpreter's own end would wait for threads that check
    an upload, and can crash when the engine's thread is in the middle of a step."""
    logging.shutdown()
    with suppress(OSError):  # nobody reads what is written
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)
