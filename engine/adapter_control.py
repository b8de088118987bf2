"""What an operator asks of an adapter: into the pool, out of it, kept in it. Imports no torch.

Everything here runs on the engine's thread, between two steps; answers leave by futures.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from polydelta.adapters_store.errors import AdapterError, InUseError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.pool import PagePool
from polydelta.engine.residency import Residency, ResidencyState


@dataclass(frozen=True, eq=False)
class _Order:
    """An adapter that is to come into the pool."""

    ref: AdapterRef
    pin: bool
    done: Future[None]


class AdapterControl:
    """Carries out orders as soon as the adapter is on the host and the pool has room."""

    def __init__(self, pool: PagePool, kv: KVCache, residency: Residency[Any, Any]) -> None:
        self._pool = pool
        self._kv = kv
        self._residency = residency
        self._orders: list[_Order] = []

    def load(self, ref: AdapterRef, pin: bool, done: Future[None]) -> None:
        """Brings an adapter into the pool, where it stays while there is room, or always.

        `done` raises AdapterError when it cannot be read, or never has room.
        """
        self._orders.append(_Order(ref, pin, done))

    def unpin(self, ref: AdapterRef, done: Future[None]) -> None:
        for order in [o for o in self._orders if o.ref == ref and o.pin]:
            self._end(order, InUseError(f"{ref.name!r} was unpinned before it was in the pool."))
        self._residency.unpin(ref)
        done.set_result(None)

    def evict(self, ref: AdapterRef, done: Future[None]) -> None:
        """Out of the pool and out of host RAM. `done` raises InUseError while it is used."""
        place = self._residency.describe(ref)
        if place.users:
            done.set_exception(
                InUseError(
                    f"{ref.name!r} is in use ({place.users} running requests): try again when "
                    "they are done."
                )
            )
        elif self._residency.is_pinned(ref):
            done.set_exception(InUseError(f"{ref.name!r} is pinned: unpin it first."))
        else:
            self._residency.evict(ref)
            done.set_result(None)

    def forget(self, ref: AdapterRef) -> None:
        """The version was deleted: frees all memory that it has here."""
        for order in [o for o in self._orders if o.ref == ref]:
            self._end(order, AdapterError(f"{ref.name!r} was deleted."))
        self._residency.forget(ref)
        self._kv.drop(ref)

    def advance(self) -> None:
        """Does what can be done now of what was ordered."""
        for order in list(self._orders):
            self._residency.prefetch(order.ref)
            match self._residency.state(order.ref):
                case ResidencyState.FAILED:
                    self._end(order, AdapterError(self._residency.take_error(order.ref)))
                case ResidencyState.ON_HOST | ResidencyState.RESIDENT:
                    self._place(order)

    def close(self) -> None:
        for order in list(self._orders):
            self._end(order, AdapterError("The engine has stopped."))

    def _place(self, order: _Order) -> None:
        ref, residency = order.ref, self._residency
        pages = residency.pages_needed(ref)
        pinned = pages + residency.num_pinned_pages(besides=[ref]) if order.pin else 0
        if pages > self._pool.num_pages or pinned > self._pool.num_pages // 2:
            self._end(order, AdapterError(self._too_large(ref, pages, order.pin)))
        elif self._pool.can_allocate(residency.pages_to_acquire(ref)):
            if order.pin:
                residency.pin(ref)
            else:
                residency.acquire(ref)
                residency.release(ref)
            self._end(order)

    def _too_large(self, ref: AdapterRef, pages: int, pin: bool) -> str:
        limit = "pinned adapters may hold half of them" if pin else "it never fits"
        return (
            f"{ref.name!r} needs {pages} pages of the pool, which has {self._pool.num_pages}, and "
            f"{limit}: start the server with a larger pool."
        )

    def _end(self, order: _Order, error: AdapterError | None = None) -> None:
        self._orders.remove(order)
        if error is None:
            order.done.set_result(None)
        else:
            order.done.set_exception(error)
