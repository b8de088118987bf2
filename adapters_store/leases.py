"""Who uses which version now, and how often each was used since somebody asked."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from polydelta.adapters_store.composition import Shares
from polydelta.adapters_store.reference import AdapterRef


class Lease:
    """Versions in use until it is released; they cannot go before that."""

    def __init__(
        self, name: str, shares: Shares, held: Sequence[AdapterRef], release: Callable[[], None]
    ) -> None:
        # As the client may read it: `id@version`, or a sum of several.
        self.name = name
        # What the engine computes.
        self.shares = shares
        # Their versions, and that of the composition that names them.
        self.held = tuple(held)
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Safe to call again, and from any thread; never waits."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Leases:
    """Counts users of each version. Threads may share it."""

    def __init__(self, on_idle: Callable[[AdapterRef], None]) -> None:
        """on_idle: called when the last user of a version has gone; must not wait."""
        self._on_idle = on_idle
        self._users: Counter[AdapterRef] = Counter()
        # Uses that were not taken yet, and when the latest began.
        self._uses: Counter[AdapterRef] = Counter()
        self._last_used: dict[AdapterRef, float] = {}
        self._lock = threading.Lock()

    def users(self, ref: AdapterRef) -> int:
        return self._users[ref]

    def take(self, name: str, shares: Shares, held: Sequence[AdapterRef]) -> Lease:
        with self._lock:
            now = time.time()
            for ref in held:
                self._users[ref] += 1
                self._uses[ref] += 1
                self._last_used[ref] = now
        return Lease(name, shares, held, lambda: self._give_back(held))

    def take_uses(self) -> list[tuple[AdapterRef, int, float]]:
        """Uses since the last call: version, requests, when the latest one began."""
        with self._lock:
            uses = [(ref, count, self._last_used[ref]) for ref, count in self._uses.items()]
            self._uses.clear()
            self._last_used.clear()
        return uses

    def put_back(self, uses: Iterable[tuple[AdapterRef, int, float]]) -> None:
        """What `take_uses` gave counts as not taken."""
        with self._lock:
            for ref, count, when in uses:
                self._uses[ref] += count
                self._last_used[ref] = max(when, self._last_used.get(ref, when))

    def _give_back(self, held: Sequence[AdapterRef]) -> None:
        idle: list[AdapterRef] = []
        with self._lock:
            for ref in held:
                self._users[ref] -= 1
                if not self._users[ref]:
                    del self._users[ref]
                    idle.append(ref)
        for ref in idle:
            self._on_idle(ref)
