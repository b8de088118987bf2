"""What stands before the pool: adapters in host RAM, and how they get into pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.adapter_entry import Bound, Packed


class HostTier(Protocol[Packed]):
    """Where packed adapters come from; loads happen on its own threads."""

    def load(self, ref: AdapterRef) -> Future[Packed]: ...

    def forget(self, ref: AdapterRef) -> None: ...

    def holds(self, ref: AdapterRef) -> bool: ...

    def reload_seconds(self, ref: AdapterRef) -> float:
        """What it would take to bring the adapter to the host once more, as measured: 0 for one
        that is there."""
        ...


# Copies a packed adapter into pages of the pool, divided as `AdapterPages` says.
Binder = Callable[[Packed, Sequence[int]], Bound]
