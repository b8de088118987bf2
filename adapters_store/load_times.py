"""How long loads into host RAM take, by where the adapter comes from."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class LoadTier(StrEnum):
    """Where a load begins."""

    # The files as they were uploaded: read, checked and packed.
    FILES = "files"
    # The packed form on disk.
    PACKED = "packed"


@dataclass(frozen=True)
class LoadTotals:
    loads: int = 0
    seconds: float = 0.0


class LoadTimes:
    """Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(LoadTier, LoadTotals())

    def ended(self, tier: LoadTier, began: float) -> None:
        """Takes note of a load. began: by time.perf_counter."""
        seconds = time.perf_counter() - began
        with self._lock:
            before = self._totals[tier]
            self._totals[tier] = LoadTotals(before.loads + 1, before.seconds + seconds)

    def totals(self) -> Mapping[LoadTier, LoadTotals]:
        with self._lock:
            return dict(self._totals)
