"""The one order in which idle adapters and cached prefix blocks leave the pool.

Greedy-dual-size-frequency (Cherkasova, HP Labs 1998): an entry's priority is its worth (seconds to
have it back, times uses, over pages) plus the clock, and the clock moves up to the priority of what
was evicted last, so that what was valuable long ago ages.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Hashable
from enum import StrEnum
from statistics import median


class EvictionReason(StrEnum):
    """Why something idle left the pool."""

    # Its pages were needed.
    ROOM = "room"
    # An operator wished so.
    ORDERED = "ordered"
    # Its adapter's version was deleted.
    DELETED = "deleted"


class EvictionOrder:
    """A priority queue with removal; equal priorities leave in the order in which they came."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._arrivals = itertools.count()
        # Entries are (priority, arrival, key); one whose arrival is not current was removed.
        self._heap: list[tuple[float, int, Hashable]] = []
        self._arrival_of: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._arrival_of)

    def add(self, key: Hashable, worth: float) -> None:
        arrival = next(self._arrivals)
        self._arrival_of[key] = arrival
        heapq.heappush(self._heap, (self._clock + worth, arrival, key))

    def remove(self, key: Hashable) -> None:
        del self._arrival_of[key]
        # Removed entries stay in the heap until popped; rebuilt when they outnumber the rest.
        if len(self._heap) > 2 * len(self._arrival_of) + 64:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def next_victim(self) -> Hashable:
        """The key to evict next, still in the order: its owner removes it."""
        while not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)
        self._clock, _, key = self._heap[0]
        return key

    def _is_current(self, entry: tuple[float, int, Hashable]) -> bool:
        return self._arrival_of.get(entry[2]) == entry[1]


class CostModel:
    """What it costs to have pages back, from what was measured while serving."""

    def __init__(self) -> None:
        # Starting guesses, soon replaced: a small model's prefill, and a copy from host RAM.
        self._seconds_per_token = 1e-3
        self._seconds_per_byte = 1e-9
        # Of the last copies of KV to host RAM and back.
        self._seconds_per_swapped_byte: deque[float] = deque(maxlen=9)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        self._seconds_per_token += 0.1 * (seconds / tokens - self._seconds_per_token)

    def observe_load(self, num_bytes: int, seconds: float) -> None:
        self._seconds_per_byte += 0.1 * (seconds / num_bytes - self._seconds_per_byte)

    def observe_swap(self, num_bytes: int, seconds: float) -> None:
        self._seconds_per_swapped_byte.append(seconds / num_bytes)

    def prefill_seconds(self, tokens: int) -> float:
        return tokens * self._seconds_per_token

    def load_seconds(self, num_bytes: int) -> float:
        return num_bytes * self._seconds_per_byte

    def swap_seconds(self, num_bytes: int) -> float:
        """Of KV, one way. The median of what was measured last, so that one slow copy does not end
        swapping, and with it the measuring; 0 before the first."""
        measured = self._seconds_per_swapped_byte
        return num_bytes * median(measured) if measured else 0.0
