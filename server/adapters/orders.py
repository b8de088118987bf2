"""What an operator orders of an adapter over HTTP: into the pool, out of it, kept in it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import to_thread

from polydelta.adapters_store.errors import UnknownAdapterError
from polydelta.adapters_store.records import AdapterRecord, VersionState
from polydelta.adapters_store.reference import AdapterName, AdapterRef
from polydelta.server.adapters.changes import Changes
from polydelta.server.adapters.errors import adapter_errors
from polydelta.server.errors import ApiError
from polydelta.server.service import Service
from polydelta.server.tenants.access import looked_up
from polydelta.server.tenants.tenant import OPERATOR, Tenant

if TYPE_CHECKING:  # it imports torch, which the routes do not need
    from polydelta.adapters_store.listing import AdapterListing

T = TypeVar("T")


class Orders:
    """Each method waits until the engine has done it, and returns the record as it is then. All but
    `load` are for operators.

    Raises ApiError: 409 for what has to wait, or is not possible with an adapter of its kind.
    """

    def __init__(self, service: Service, listing: AdapterListing, changes: Changes) -> None:
        self._service = service
        self._listing = listing
        self._changes = changes

    async def load(self, tenant: Tenant, name: str) -> AdapterRecord:
        """Of a composition, all parts."""
        record = await self._find(tenant, name)
        with _hidden_parts_unnamed(tenant, record):
            refs = await to_thread.run_sync(self._refs, record)
            orders = [self._service.engine.load_adapter(ref) for ref in refs]
            await self._unless_withdrawn(self._loaded(refs, orders), orders)
        return record

    async def evict(self, name: str) -> AdapterRecord:
        record = await self._find_single(name, "evict")
        (ref,) = await to_thread.run_sync(self._refs, record)
        await self._done(self._service.engine.evict_adapter(ref))
        return record

    async def pin(self, name: str) -> AdapterRecord:
        """The pin outlives the server."""
        record = await self._find_own(name, "pin")
        order = self._service.engine.load_adapter(self._service.store.ref(record), pin=True)
        return await self._unless_withdrawn(self._pinned(record, order), [order])

    async def unpin(self, name: str) -> AdapterRecord:
        record = await self._find_own(name, "unpin")
        await self._done(self._service.engine.unpin_adapter(self._service.store.ref(record)))
        return await self._note(record, pinned=False)

    async def _find(self, tenant: Tenant, name: str) -> AdapterRecord:
        with adapter_errors("id"):
            record = await to_thread.run_sync(self._listing.record, looked_up(tenant, name))
        if record.state is VersionState.DELETING:
            raise ApiError(409, f"{record.name!r} is being deleted: take another version.", "id")
        return record

    async def _find_single(self, name: str, order: str) -> AdapterRecord:
        record = await self._find(OPERATOR, name)
        if record.parts:
            parts = ", ".join(f"'{part.id}@{part.version}'" for part in record.parts)
            raise ApiError(
                409,
                f"{record.name!r} is a composition, which has no place of its own: {order} its "
                f"parts ({parts}).",
                "id",
            )
        return record

    async def _find_own(self, name: str, order: str) -> AdapterRecord:
        record = await self._find_single(name, order)
        await to_thread.run_sync(self._changes.own, AdapterName(record.id))
        return record

    def _refs(self, record: AdapterRecord) -> list[AdapterRef]:
        """Raises ApiError."""
        with adapter_errors("id"):
            if not record.parts:
                return [self._listing.ref(record)]
            store = self._service.store
            parts = [store.find(AdapterName(part.id, part.version)) for part in record.parts]
            return [store.ref(part) for part in parts]

    async def _unless_withdrawn(
        self, work: Coroutine[Any, Any, T], orders: Sequence[Future[None]]
    ) -> T:
        """The result of `work`, which waits for `orders`. Cancelled, because the client has left,
        it withdraws them; one that was carried out just before is noted all the same, so that the
        record and the pool agree."""
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError:
            for order in orders:
                self._service.engine.withdraw(order)
            with suppress(ApiError):  # nobody is there to read it
                await working
            raise
        return working.result()

    async def _pinned(self, record: AdapterRecord, order: Future[None]) -> AdapterRecord:
        await self._loaded([self._service.store.ref(record)], [order])
        return await self._note(record, pinned=True)

    async def _loaded(self, refs: Sequence[AdapterRef], orders: Sequence[Future[None]]) -> None:
        try:
            await self._done(*orders)
        finally:
            await to_thread.run_sync(self._forget_deleted, refs)

    def _forget_deleted(self, refs: Sequence[AdapterRef]) -> None:
        """A version that was deleted just before its load began has been forgotten already, and
        would stay in the pool for ever. Raises ApiError for one that is gone."""
        with adapter_errors("id"):
            for ref in refs:
                if ref.digest is None:  # a folder of the operator's
                    continue
                try:
                    self._service.store.find(AdapterName(ref.id, ref.version))
                except UnknownAdapterError:
                    self._service.engine.forget_adapter(ref)
                    raise

    async def _note(self, record: AdapterRecord, pinned: bool) -> AdapterRecord:
        name = AdapterName(record.id, record.version)
        with adapter_errors("id"):
            return await to_thread.run_sync(self._service.store.pin, name, pinned)

    async def _done(self, *orders: Future[None]) -> None:
        """Waits for the engine."""
        try:
            with adapter_errors("id"):
                await asyncio.gather(*map(asyncio.wrap_future, orders))
        except (ApiError, RuntimeError):
            # An engine that has stopped ends every order with an error of its own.
            self._service.check_alive()
            raise


@contextmanager
def _hidden_parts_unnamed(tenant: Tenant, record: AdapterRecord) -> Iterator[None]:
    """Errors say nothing of a composition's parts to whoever may not use them all."""
    try:
        yield
    except ApiError as error:
        if all(tenant.may_use(part.id) for part in record.parts):
            raise
        raise ApiError(
            error.status, f"{record.name!r} cannot be loaded: one of its parts cannot.", error.param
        ) from None
