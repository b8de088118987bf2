"""What an operator asks of an adapter: into the pool, out of it, kept in it. Imports no torch.

Everything here runs on the engine's thread, between two steps; answers leave by futures.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from polydelta.adapters_store.errors import AdapterError, InUseError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.adapter_entry import ResidencyState
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.pools import Pools
from polydelta.engine.residency import Residency
from polydelta.engine.scheduler import Scheduler


@dataclass(frozen=True, eq=False)
class _Order:
    """An adapter that is to come into the pool."""

    ref: AdapterRef
    pin: bool
    done: Future[None]


class AdapterControl:
    """Carries out orders as soon as the adapter is on the host and the pool has room."""

    def __init__(
        self, pools: Pools, kv: KVCache, residency: Residency[Any, Any], scheduler: Scheduler
    ) -> None:
        """scheduler: has the requests that wait for the same adapters."""
        self._pool = pools.adapters
        self._kv = kv
        self._residency = residency
        self._scheduler = scheduler
        self._orders: list[_Order] = []

    def load(self, ref: AdapterRef, pin: bool, done: Future[None]) -> None:
        """Brings an adapter into the pool, where it stays while there is room, or always.

        `done` raises AdapterError when it cannot be read, or never has room.
        """
        self._orders.append(_Order(ref, pin, done))

    def withdraw(self, done: Future[None]) -> None:
        """Whoever gave an order has left: it ends with AdapterError, unless it was carried out."""
        for order in [o for o in self._orders if o.done is done]:
            self._end(order, AdapterError(f"The order for {order.ref.name!r} was withdrawn."))

    def unpin(self, ref: AdapterRef, done: Future[None]) -> None:
        for order in [o for o in self._orders_for(ref) if o.pin]:
            self._end(order, InUseError(f"{ref.name!r} was unpinned before it was in the pool."))
        self._residency.unpin(ref)
        done.set_result(None)

    def evict(self, ref: AdapterRef) -> None:
        """Out of the pool and out of host RAM. Raises InUseError while it is used or pinned."""
        place = self._residency.describe(ref)
        if place.users:
            raise InUseError(
                f"{ref.name!r} is in use ({place.users} running requests): try again when they "
                "are done."
            )
        if self._residency.is_pinned(ref):
            raise InUseError(f"{ref.name!r} is pinned: unpin it first.")
        self._residency.evict(ref)

    def forget(self, ref: AdapterRef) -> None:
        """The version was deleted: frees all memory that it has here."""
        for order in self._orders_for(ref):
            self._end(order, AdapterError(f"{ref.name!r} was deleted."))
        self._residency.forget(ref)
        self._kv.drop(ref)

    def advance(self) -> None:
        """Does what can be done now of what was ordered."""
        for ref in dict.fromkeys(order.ref for order in self._orders):
            self._residency.prefetch(ref)
            match self._residency.state(ref):
                case ResidencyState.FAILED:
                    self._fail(ref)
                case ResidencyState.ON_HOST | ResidencyState.RESIDENT:
                    for order in self._orders_for(ref):
                        self._place(order)

    def close(self) -> None:
        for order in list(self._orders):
            self._end(order, AdapterError("The engine has stopped."))

    def _orders_for(self, ref: AdapterRef) -> list[_Order]:
        return [order for order in self._orders if order.ref == ref]

    def _fail(self, ref: AdapterRef) -> None:
        """One failed load ends every order for it, and every request that waits for it."""
        error = self._residency.take_error(ref)
        for order in self._orders_for(ref):
            self._end(order, error)
        self._scheduler.fail_waiting(ref, error)

    def _place(self, order: _Order) -> None:
        ref, residency = order.ref, self._residency
        problem = self._lack_of_pages(order) or self._lack_of_positions(ref)
        if problem is not None:
            self._end(order, AdapterError(problem))
        elif self._pool.can_allocate(residency.pages_to_acquire(ref)):
            if order.pin:
                residency.pin(ref)
            else:
                residency.acquire(ref)
                residency.release(ref)
            self._end(order)

    def _lack_of_pages(self, order: _Order) -> str | None:
        """None where it may have them."""
        pages = self._residency.pages_needed(order.ref)
        pinned = self._residency.num_pinned_pages(besides=[order.ref])
        pool = self._pool.num_pages
        if pages + pinned <= (pool // 2 if order.pin else pool):
            return None
        others = f", {pinned} of which other pinned adapters hold" if pinned else ""
        limit = "pinned adapters may hold half of them" if order.pin else "it never fits"
        unpin = "unpin others, or " if pinned else ""
        return (
            f"{order.ref.name!r} needs {pages} pages of the pool, which has {pool}{others}, and "
            f"{limit}: {unpin}start the server with a larger pool."
        )

    def _lack_of_positions(self, ref: AdapterRef) -> str | None:
        """None where its virtual tokens leave room for the shortest prompt and an answer."""
        virtual = self._residency.traits(ref).num_prefix_tokens
        limit = self._scheduler.max_positions
        if virtual + 1 < limit:
            return None
        return (
            f"{ref.name!r} puts {virtual} virtual tokens before a prompt, but the context window "
            f"is {limit} tokens: use an adapter with fewer of them."
        )

    def _end(self, order: _Order, error: AdapterError | None = None) -> None:
        self._orders.remove(order)
        if error is None:
            order.done.set_result(None)
            return
        # Left on its way, it would hold host RAM, and one of the places for what is loaded ahead.
        if not self._orders_for(order.ref) and not self._scheduler.is_awaited(order.ref):
            self._residency.drop_unused(order.ref)
        order.done.set_exception(error)
