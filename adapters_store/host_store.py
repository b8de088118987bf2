"""The host-RAM tier: packed adapters that are ready to be copied into the pool."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future

from polydelta.adapters_store.disk_tier import AdapterLoader
from polydelta.adapters_store.load_times import LoadTier
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packed_file import in_memory
from polydelta.adapters_store.reference import AdapterRef

# What loads get to end when the store is closed.
CLOSE_SECONDS = 2.0


class HostStore:
    """Loads adapters off the caller's thread and keeps them, least recently used out first.

    Threads may share it. What is handed out stays valid when the store lets go of it.
    """

    def __init__(
        self, loader: AdapterLoader, capacity_bytes: int, workers: int = 1, pin: bool = False
    ) -> None:
        """capacity_bytes: of packed adapters kept; those still loading do not count.
        workers: loads at the same time. pin: keep them page-locked, for a GPU."""
        self._loader = loader
        self._pin = pin
        self._capacity_bytes = capacity_bytes
        self._kept_bytes = 0
        self._loading: dict[AdapterRef, Future[PackedAdapter]] = {}
        # Of those, whoever waits gets them, and nobody keeps them.
        self._forgotten: set[AdapterRef] = set()
        self._kept: OrderedDict[AdapterRef, PackedAdapter] = OrderedDict()
        self._lock = threading.Lock()
        # Each load has a thread that ends with it, and waits for one of so many turns. One that
        # stayed would keep its OpenMP team, and slow down everybody else's (see engine/build.py).
        self._threads: set[threading.Thread] = set()
        self._turns = threading.Semaphore(workers)
        self._closed = False

    def load(self, ref: AdapterRef) -> Future[PackedAdapter]:
        """Never waits. All who ask for the same version while it loads share one load.

        The future raises InvalidAdapterError; whoever asks after that starts a new load. It cannot
        be cancelled, because others may wait for it too. Raises RuntimeError after `close`.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("The adapter store is closed.")
            if ref in self._loading:
                self._forgotten.discard(ref)
                return self._loading[ref]
            future: Future[PackedAdapter] = Future()
            future.set_running_or_notify_cancel()
            if ref in self._kept:
                self._kept.move_to_end(ref)
                future.set_result(self._kept[ref])
            else:
                thread = threading.Thread(
                    target=self._load, args=(ref, future), name="adapter-load", daemon=True
                )
                self._threads.add(thread)
                self._loading[ref] = future
                thread.start()
            return future

    def holds(self, ref: AdapterRef) -> bool:
        """Whether `load` would answer at once."""
        with self._lock:
            return ref in self._kept

    def reload_seconds(self, ref: AdapterRef) -> float:
        """What it would take to have the adapter here once more: 0 for one that is kept, else what
        loads of packed forms took until now, each."""
        if self.holds(ref):
            return 0.0
        packed = self._loader.times.totals()[LoadTier.PACKED]
        return packed.seconds / packed.loads if packed.loads else 0.0

    def peek(self, ref: AdapterRef) -> PackedAdapter | None:
        """The adapter, if it is kept; it does not count as used."""
        with self._lock:
            return self._kept.get(ref)

    def forget(self, ref: AdapterRef) -> None:
        """Lets go of a version; one that is loading is not kept, unless it is asked for again."""
        with self._lock:
            if ref in self._loading:
                self._forgotten.add(ref)
            if (packed := self._kept.pop(ref, None)) is not None:
                self._kept_bytes -= self._size(packed)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Loads that have not begun fail; those that have are waited for, so many seconds in all: a
        disk that hangs must not keep the process."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        until = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        with self._lock:
            self._kept.clear()
            self._kept_bytes = 0

    def _load(self, ref: AdapterRef, future: Future[PackedAdapter]) -> None:
        try:
            with self._turns:
                if self._closed:
                    raise RuntimeError("The adapter store was closed.")
                packed = in_memory(self._loader.load(ref), self._pin)
        except BaseException as error:
            self._end_load(ref, None)
            future.set_exception(error)
            return
        self._end_load(ref, packed)
        # Outside the lock: this runs the callbacks of those who wait, and they may call `load`.
        future.set_result(packed)

    def _end_load(self, ref: AdapterRef, packed: PackedAdapter | None) -> None:
        with self._lock:
            del self._loading[ref]
            self._threads.remove(threading.current_thread())
            forgotten = ref in self._forgotten
            self._forgotten.discard(ref)
            if packed is not None and not forgotten:
                self._keep(ref, packed)

    def _keep(self, ref: AdapterRef, packed: PackedAdapter) -> None:
        self._kept[ref] = packed
        self._kept_bytes += self._size(packed)
        while self._kept_bytes > self._capacity_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= self._size(oldest)

    def _size(self, packed: PackedAdapter) -> int:
        """What it takes: torch gives page-locked memory in powers of two."""
        if not self._pin or not packed.nbytes:
            return packed.nbytes
        return 1 << (packed.nbytes - 1).bit_length()
