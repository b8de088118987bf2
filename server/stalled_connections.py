"""Connections on which nothing moves because the client does not do its part."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

logger = logging.getLogger(__name__)

# How long the head of a request may take to come, in seconds.
HEAD_SECONDS = 60.0
# How long a client may take nothing of what was written for it, in seconds.
READER_SECONDS = 90.0


class StalledConnections:
    """Ends connections that wait for the head of a request (uvicorn bounds that between requests
    only while nothing comes) or for somebody to read.

    To the routes that is a client which hung up: what it asked for is aborted.
    """

    def __init__(
        self, head_seconds: float = HEAD_SECONDS, reader_seconds: float = READER_SECONDS
    ) -> None:
        self._head_seconds = head_seconds
        self._reader_seconds = reader_seconds
        # Connection -> its request and how many bytes wait to be taken, and since when that is so.
        self._seen: dict[Any, tuple[tuple[object, int], float]] = {}

    def end(self, connections: Collection[Any], now: float) -> None:
        """To be called about once a second.

        connections: uvicorn's. now: seconds, on a clock that never goes back.
        """
        seen = {}
        for connection in connections:
            written = connection.transport.get_write_buffer_size()
            state = connection.cycle, written
            before, since = self._seen.get(connection, (None, now))
            if before != state:
                since = now
            seen[connection] = state, since
            if written:
                patience = self._reader_seconds
            elif connection.cycle is None or connection.cycle.response_complete:
                patience = self._head_seconds
            else:  # the answer is being made, or a body read, which has a limit of its own
                continue
            if now - since >= patience:
                what = "takes nothing" if written else "sends no request"
                logger.info("%s %s: its connection is closed", connection.client, what)
                connection.transport.abort()
        self._seen = seen
