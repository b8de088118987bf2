"""The process around the application: a bound port, uvicorn, and an orderly stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from polydelta.server.settings import ServerSettings, SettingsError

if TYPE_CHECKING:  # the engine imports torch, which takes seconds
    from fastapi import FastAPI

    from polydelta.engine.engine import Engine

# How often a stop looks whether requests are still running, in seconds.
DRAIN_POLL = 0.05
# What connections get to send their last bytes once the engine has stopped, in seconds.
LAST_BYTES = 5


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
    """uvicorn, telling when it is ready, and stopping the engine before it closes connections."""

    def __init__(
        self, app: FastAPI, engine: Engine, settings: ServerSettings, on_ready: Callable[[], None]
    ) -> None:
        # Warns of every malformed upload, which anybody can send.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        config = uvicorn.Config(
            app,
            log_level=settings.log_level,
            lifespan="off",
            timeout_graceful_shutdown=LAST_BYTES,
        )
        super().__init__(config)
        self._engine = engine
        self._grace = settings.shutdown_timeout
        self._on_ready = on_ready

    def serve_until_stopped(self, bound: socket.socket) -> None:
        """Starts the engine, serves until SIGINT or SIGTERM, stops the engine."""
        self._engine.start()
        # While it serves, uvicorn catches both; afterwards it raises them again for whoever had
        # them before, when all that they ask for has been done.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        try:
            self.run(sockets=[bound])
        finally:
            self._engine.shutdown()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in self.servers:
            listener.close()
        await self._drain()
        # Requests in flight end with finish_reason "abort", and their connections can close.
        await asyncio.to_thread(self._engine.shutdown)
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        """Waits for requests in flight, as long as the settings allow."""
        polls = int(self._grace / DRAIN_POLL)
        for _ in range(polls):
            stats = self._engine.stats()
            if self.force_exit or stats.num_running + stats.num_waiting == 0:
                return
            await asyncio.sleep(DRAIN_POLL)
