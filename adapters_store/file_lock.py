"""Locks between processes that share a store; one that dies lets go of its own."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Presence:
    """Held by every process for as long as it has the store open.

    `alone` says whether nobody else had it open when it was taken; whoever comes later waits until
    `settle` is called, so that what is done between the two is done in nobody's way.
    """

    def __init__(self, path: Path) -> None:
        self._handle = open(path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.alone = True
        except BlockingIOError:
            fcntl.flock(self._handle, fcntl.LOCK_SH)
            self.alone = False

    def settle(self) -> None:
        fcntl.flock(self._handle, fcntl.LOCK_SH)

    def close(self) -> None:
        """Safe to call again."""
        self._handle.close()


class Turn:
    """One thread of one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        with self._lock:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield
            finally:
                os.close(handle)
