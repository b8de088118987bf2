"""What other threads ask of the engine's own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

Command = Callable[[], None]


class EngineDeadError(RuntimeError):
    """The engine's loop has ended; it takes no more requests."""


class Commands:
    """Any thread may give them; the engine's takes them, in their order, between two steps."""

    def __init__(self, wake: threading.Event, is_alive: Callable[[], bool]) -> None:
        """wake: set whenever one is given. is_alive: whether there is a thread to take them."""
        self._wake = wake
        self._is_alive = is_alive
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
        # Guards the end: after it no command is taken that nobody would carry out.
        self._closing = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        """Those that nobody took yet."""
        return self._queue.qsize()

    def give(self, command: Command) -> bool:
        """Whether it will be carried out."""
        with self._closing:
            if self._closed or not self._is_alive():
                return False
            self._queue.put(command)
        self._wake.set()
        return True

    def order(self, command: Callable[[Future[None]], None]) -> Future[None]:
        """What says when the command is done; raises EngineDeadError where it never will be."""
        done: Future[None] = Future()
        # It cannot be cancelled: what was begun on the engine's thread is ended there.
        done.set_running_or_notify_cancel()
        if not self.give(lambda: command(done)):
            done.set_exception(EngineDeadError("The engine is not running."))
        return done

    def take(self) -> Command | None:
        """The next one; None where there is none."""
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """No more are given; those that were can still be taken."""
        with self._closing:
            self._closed = True
