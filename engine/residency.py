"""Which adapters lie in the pool, which are on their way, and who uses them. Imports no torch.

    on disk -> loading to host -> on host -> resident
                      |                        |  ^
                      v                        v  |  in use, or idle and evictable
                    failed                  on disk

This class alone moves an adapter from one state to another, on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Generic

from polydelta.adapters_store.errors import AdapterError, StoreError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.adapter_entry import (
    AdapterEntry,
    AdapterPlace,
    Bound,
    Packed,
    ResidencyState,
    ResidentAdapter,
)
from polydelta.engine.adapter_usage import AdapterUsage
from polydelta.engine.eviction import CostModel, EvictionReason
from polydelta.engine.host_adapter import count_pages
from polydelta.engine.host_tier import Binder, HostTier
from polydelta.engine.pool import PagePool

logger = logging.getLogger(__name__)


class Residency(Generic[Packed, Bound]):
    """Adapters in the pool. Ask (`state`, `pages_to_acquire`), then `acquire`: it cannot fail."""

    def __init__(
        self,
        pool: PagePool,
        page_bytes: int,
        block_size: int,
        host: HostTier[Packed],
        bind: Binder[Packed, Bound],
        costs: CostModel,
        on_loaded: Callable[[], None],
        usage: AdapterUsage,
    ) -> None:
        self._pool = pool
        self._page_bytes = page_bytes
        self._block_size = block_size
        self._host = host
        self._bind = bind
        self._costs = costs
        # Called on a loader's thread when a load ends, so that the engine looks again.
        self._on_loaded = on_loaded
        self._entries: dict[AdapterRef, AdapterEntry[Packed, Bound]] = {}
        # Loads under way that nobody waits for any more.
        self._abandoned: list[Future[Packed]] = []
        self.usage = usage
        self.num_load_failures = 0
        self.evictions = Counter(dict.fromkeys(EvictionReason, 0))

    def state(self, ref: AdapterRef) -> ResidencyState:
        """Where the adapter is now; notices that a load has ended."""
        entry = self._entries.get(ref)
        if entry is None:
            return ResidencyState.ON_DISK
        if entry.loading is not None and entry.loading.done():
            self._finish_load(entry, entry.loading)
        return entry.state

    def prefetch(self, ref: AdapterRef) -> None:
        """Starts to bring an adapter to the host, if that is not done or under way."""
        if self.state(ref) is not ResidencyState.ON_DISK:
            return
        entry = self._entries.setdefault(ref, AdapterEntry())
        entry.state = ResidencyState.LOADING_TO_HOST
        entry.loading = self._host.load(ref)
        entry.loading.add_done_callback(lambda _: self._on_loaded())

    def is_resident(self, ref: AdapterRef) -> bool:
        return self.state(ref) is ResidencyState.RESIDENT

    def digest(self, ref: AdapterRef) -> str:
        """Of the adapter's content; it must be on the host or resident."""
        return self._entries[ref].digest

    def traits(self, ref: AdapterRef) -> AdapterTraits:
        """How the adapter acts on a sequence; it must be on the host or resident."""
        return self._entries[ref].traits

    def prefix_pages(self, ref: AdapterRef) -> list[int]:
        """Pages of a resident adapter's virtual tokens, in their order; nobody may write them."""
        entry = self._entries[ref]
        return entry.pages[entry.size.weights :]

    def take_error(self, ref: AdapterRef) -> AdapterError:
        """Why the load failed; forgets the failure, so that the next request tries again."""
        return self._entries.pop(ref).error or StoreError("unknown error")

    def drop_unused(self, ref: AdapterRef) -> None:
        """Nobody waits for the adapter any more: lets go of what was loaded for the pool."""
        if ref in self._entries and self.state(ref) is not ResidencyState.RESIDENT:
            if (loading := self._entries[ref].loading) is not None:
                self._abandoned.append(loading)
            del self._entries[ref]

    def drop_from_host(self, besides: Sequence[AdapterRef]) -> None:
        """Lets go of one adapter that was brought to the host for the pool, if there is one."""
        for ref, entry in self._entries.items():
            if entry.state is ResidencyState.ON_HOST and ref not in besides:
                del self._entries[ref]
                return

    def pages_to_acquire(self, ref: AdapterRef) -> int:
        """How many available pages `acquire` would take from the pool: those still to be
        allocated, or those that are resident and idle now."""
        entry = self._entries[ref]
        if entry.state is ResidencyState.RESIDENT:
            return 0 if entry.users else len(entry.pages)
        return self.pages_needed(ref)

    def pages_needed(self, ref: AdapterRef) -> int:
        """The adapter's size in pages; it must be on the host or resident."""
        entry = self._entries[ref]
        if not entry.size.total:
            raise ValueError(f"adapter {ref.name} is {entry.state.value}: its size is not known")
        return entry.size.total

    def acquire(self, ref: AdapterRef) -> Bound:
        """Makes the adapter resident, for one more sequence."""
        entry = self._entries[ref]
        if entry.state is ResidencyState.ON_HOST:
            self._load_to_pool(ref, entry)
        elif not entry.users:
            self._pool.revive(ref)
        entry.users += 1
        entry.uses += 1
        return self.bound(ref)

    def bound(self, ref: AdapterRef) -> Bound:
        """A resident adapter, for the runner."""
        bound = self._entries[ref].bound
        if bound is None:
            raise ValueError(f"adapter {ref.name} is not resident")
        return bound

    def release(self, ref: AdapterRef) -> None:
        """One sequence less uses it; the last one leaves it idle, and evictable."""
        entry = self._entries[ref]
        entry.users -= 1
        if not entry.users:
            copy = self._costs.load_seconds(entry.nbytes) if entry.cost is None else entry.cost
            cost = self._host.reload_seconds(ref) + copy
            self._pool.retire(ref, entry.pages, cost, entry.uses, partial(self._forget, ref))
            if entry.doomed:
                self._pool.evict(ref, EvictionReason.DELETED)

    def pin(self, ref: AdapterRef) -> None:
        """Keeps an adapter that is on the host or resident in the pool, used or not."""
        if not self._entries[ref].pinned:
            self.acquire(ref)
            self._entries[ref].pinned = True

    def unpin(self, ref: AdapterRef) -> None:
        entry = self._entries.get(ref)
        if entry is not None and entry.pinned:
            entry.pinned = False
            self.release(ref)

    def is_pinned(self, ref: AdapterRef) -> bool:
        return ref in self._entries and self._entries[ref].pinned

    def evict(self, ref: AdapterRef, reason: EvictionReason = EvictionReason.ORDERED) -> None:
        """Takes an adapter that nobody uses or pins out of the pool and out of host RAM."""
        if self.is_resident(ref):
            self._pool.evict(ref, reason)
        self._entries.pop(ref, None)
        self._host.forget(ref)

    def forget(self, ref: AdapterRef) -> None:
        """The version was deleted: lets go of all that is kept of it, as soon as it is not used."""
        self.unpin(ref)
        if ref in self._entries and self._entries[ref].users:
            self._entries[ref].doomed = True
            self._host.forget(ref)
        else:
            self.evict(ref, EvictionReason.DELETED)

    def is_doomed(self, ref: AdapterRef) -> bool:
        """Whether the version was deleted, and is there only as long as its users are."""
        return ref in self._entries and self._entries[ref].doomed

    def resident(self) -> list[ResidentAdapter]:
        return [
            ResidentAdapter(ref.id, ref.version, len(entry.pages))
            for ref, entry in self._entries.items()
            if entry.state is ResidencyState.RESIDENT
        ]

    def describe(self, ref: AdapterRef) -> AdapterPlace:
        """Where the adapter is at the moment; any thread may ask."""
        entry = self._entries.get(ref)
        if entry is None:
            state = ResidencyState.ON_HOST if self._host.holds(ref) else ResidencyState.ON_DISK
            return AdapterPlace(state)
        return AdapterPlace(entry.state, len(entry.pages), entry.users - entry.pinned)

    def num_on_their_way(self) -> int:
        """Adapters that take host RAM, or will, until they are in the pool; loads that nobody waits
        for any more among them."""
        ways = (ResidencyState.LOADING_TO_HOST, ResidencyState.ON_HOST)
        self._abandoned = [loading for loading in self._abandoned if not loading.done()]
        return len(self._abandoned) + sum(e.state in ways for e in self._entries.values())

    def num_pinned_pages(self, besides: Sequence[AdapterRef] = ()) -> int:
        return sum(
            len(e.pages) for ref, e in self._entries.items() if e.pinned and ref not in besides
        )

    def used_pages(self) -> list[int]:
        """Pages of adapters that some sequence uses."""
        return [page for entry in self._entries.values() if entry.users for page in entry.pages]

    def num_idle_pages(self) -> int:
        return sum(len(e.pages) for e in self._entries.values() if not e.users)

    def _finish_load(self, entry: AdapterEntry[Packed, Bound], loading: Future[Packed]) -> None:
        entry.loading = None
        if loading.cancelled():
            self._fail_load(entry, StoreError("its load was cancelled"))
            return
        if (error := loading.exception()) is not None:
            self._fail_load(entry, _told(error))
            return
        packed = entry.packed = loading.result()
        entry.digest, entry.traits, entry.nbytes = packed.digest, packed.traits, packed.nbytes
        entry.size = count_pages(packed, self._page_bytes, self._block_size)
        entry.state = ResidencyState.ON_HOST

    def _fail_load(self, entry: AdapterEntry[Packed, Bound], error: AdapterError) -> None:
        entry.state, entry.error = ResidencyState.FAILED, error
        self.num_load_failures += 1

    def _load_to_pool(self, ref: AdapterRef, entry: AdapterEntry[Packed, Bound]) -> None:
        packed = entry.packed
        if packed is None:
            raise ValueError(f"adapter {ref.name} is {entry.state.value}, not on the host")
        # Only weights are better read in one piece.
        weights = self._pool.allocate_run(entry.size.weights)
        entry.pages = weights + self._pool.allocate(entry.size.prefix)
        began = time.perf_counter()
        entry.bound = self._bind(packed, entry.pages)
        seconds = time.perf_counter() - began
        if entry.size.prefix:
            entry.cost = seconds
        else:
            self._costs.observe_load(max(1, packed.nbytes), seconds)
        entry.packed = None
        entry.state = ResidencyState.RESIDENT
        counts = self.usage.counts(ref.id)
        counts.swap_ins += 1
        counts.swap_in_seconds += seconds

    def _forget(self, ref: AdapterRef, reason: EvictionReason) -> None:
        del self._entries[ref]
        self.evictions[reason] += 1
        self.usage.counts(ref.id).swap_outs += 1


def _told(error: BaseException) -> AdapterError:
    """What a client may read of a failed load."""
    if isinstance(error, AdapterError):
        return error
    logger.error("an adapter could not be loaded", exc_info=error)
    return StoreError("it could not be loaded; see the server's log")
