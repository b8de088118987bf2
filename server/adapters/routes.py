"""`/v1/adapters`: versions made, shown, loaded, pinned, rolled back, deleted. Every route asks who
asks: see tenants/access.py.

Plain functions run in threads of FastAPI's; the others never wait for a disk or a database.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from polydelta.adapters_store.delta_kinds import KINDS
from polydelta.adapters_store.labels import check_labels
from polydelta.adapters_store.records import AdapterRecord, VersionState
from polydelta.adapters_store.reference import is_id
from polydelta.server.adapters.bodies import described, is_form, read_json
from polydelta.server.adapters.changes import Changes, without_version
from polydelta.server.adapters.errors import adapter_errors
from polydelta.server.adapters.orders import Orders
from polydelta.server.adapters.publishing import Publishing
from polydelta.server.adapters.responses import (
    DELETED,
    AdapterList,
    AdapterObject,
    AdapterPage,
    PublishedAdapter,
    describe,
)
from polydelta.server.adapters.schemas import (
    CreateAdapter,
    DeleteQuery,
    ListQuery,
    NewVersion,
    Rollback,
)
from polydelta.server.errors import ApiError, shown
from polydelta.server.openai.generation import unless_client_leaves
from polydelta.server.service import Service
from polydelta.server.tenants.access import looked_up, operators_only
from polydelta.server.tenants.tenant import Tenant, tenant_of

if TYPE_CHECKING:  # what checks an upload imports torch, which the routes do not need
    from polydelta.adapters_store.upload.publisher import Published


def adapters_router(service: Service, publishing: Publishing, changes: Changes) -> APIRouter:
    # Here and not above: looking into adapters imports torch, which takes seconds.
    from polydelta.adapters_store.listing import AdapterListing

    router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
    for_operators = [Depends(operators_only)]
    listing = AdapterListing(service.store)
    orders = Orders(service, listing, changes)

    @router.post(
        "",
        status_code=201,
        response_model=PublishedAdapter,
        openapi_extra=described(CreateAdapter, "id"),
    )
    async def create_adapter(request: Request) -> Response:
        """A new version: from a form with files, or from JSON with `compose` or `path`.

        200 when the newest version already is what was sent.
        """
        tenant = tenant_of(request)
        if is_form(request):
            return await answer(tenant, await publishing.from_form(tenant, request, None))
        body = await read_json(request, CreateAdapter)
        published = await publish(tenant, body.id, body)
        if published is None:
            raise ApiError(
                400, "compose: give this field or path, or send the files as a form.", "compose"
            )
        return await answer(tenant, published)

    @router.put("/{name}", response_model=PublishedAdapter, openapi_extra=described(NewVersion))
    async def put_adapter(name: str, request: Request) -> Response:
        """As POST, under the id in the path. With `labels` alone, those of the newest version or of
        `id@version` are replaced."""
        tenant = tenant_of(request)
        if is_form(request):
            return await answer(tenant, await publishing.from_form(tenant, request, name))
        body = await read_json(request, NewVersion)
        published = await publish(tenant, name, body)
        if published is not None:
            return await answer(tenant, published)
        if body.labels is None:
            raise ApiError(400, "labels: give this field, compose or path.", "labels")
        record = await to_thread.run_sync(changes.label, tenant, name, body.labels)
        return JSONResponse((await shown_soon(tenant, record)).model_dump())

    @router.get("")
    def list_adapters(query: Annotated[ListQuery, Query()], request: Request) -> AdapterPage:
        """The newest ready version of each id, by id, those in the operator's folders included."""
        if query.after is not None and not is_id(query.after):
            raise ApiError(400, f"after: {shown(query.after)} is no adapter id.", "after")
        if query.kind not in (None, *KINDS):
            kinds = ", ".join(KINDS)
            raise ApiError(400, f"kind: {shown(query.kind)} is none of {kinds}.", "kind")
        labels, tenant = _labels(query.label), tenant_of(request)
        with adapter_errors():
            service.store.try_to_flush()
            records = listing.page(
                query.after or "", query.limit + 1, labels, query.kind, tenant.seen
            )
        data = [describe(service, tenant, record) for record in records[: query.limit]]
        return AdapterPage(
            object="list",
            data=data,
            has_more=len(records) > query.limit,
            last_id=data[-1].id if data else None,
        )

    @router.get("/{name}")
    def show_adapter(name: str, request: Request) -> AdapterObject:
        """The newest version, or `id@version`."""
        tenant = tenant_of(request)
        with adapter_errors("id"):
            service.store.try_to_flush()
            return describe(service, tenant, listing.record(looked_up(tenant, name)))

    @router.get("/{adapter_id}/versions")
    def list_versions(adapter_id: str, request: Request) -> AdapterList:
        """All versions, oldest first."""
        tenant = tenant_of(request)
        with adapter_errors("id"):
            service.store.try_to_flush()
            records = listing.versions(without_version(looked_up(tenant, adapter_id)))
        data = [describe(service, tenant, record) for record in records]
        return AdapterList(object="list", data=data)

    @router.delete("/{name}")
    def delete_adapter(
        name: str, query: Annotated[DeleteQuery, Query()], request: Request
    ) -> AdapterList:
        """One version (`id@version`), or all of an id.

        Those that requests use are not deleted (409), or with `in_use=defer` when these are done.
        """
        tenant = tenant_of(request)
        records = changes.delete(tenant, name, defer=query.in_use == "defer")
        states = [None if r.state is VersionState.DELETING else DELETED for r in records]
        data = [describe(service, tenant, *each) for each in zip(records, states, strict=True)]
        return AdapterList(object="list", data=data)

    @router.post("/{adapter_id}/rollback", status_code=201)
    def roll_back(
        adapter_id: str, body: Rollback, request: Request, response: Response
    ) -> AdapterObject:
        """An older version's content as the newest version, with a new number.

        200 when the newest version already is that content.
        """
        tenant = tenant_of(request)
        record, created = changes.roll_back(tenant, adapter_id, body.version)
        if not created:
            response.status_code = 200
        return describe(service, tenant, record)

    @router.post("/{name}/load")
    async def load_adapter(name: str, request: Request) -> AdapterObject:
        """Into the pool, before anybody asks for it; of a composition, all parts."""
        return await ordered(request, orders.load(tenant_of(request), name))

    @router.post("/{name}/evict", dependencies=for_operators)
    async def evict_adapter(name: str, request: Request) -> AdapterObject:
        """Out of the pool and out of host memory; 409 while it is used or pinned."""
        return await ordered(request, orders.evict(name))

    @router.post("/{name}/pin", dependencies=for_operators)
    async def pin_adapter(name: str, request: Request) -> AdapterObject:
        """Into the pool, to stay there, after a restart too."""
        return await ordered(request, orders.pin(name))

    @router.post("/{name}/unpin", dependencies=for_operators)
    async def unpin_adapter(name: str, request: Request) -> AdapterObject:
        """The pool may evict it again."""
        return await ordered(request, orders.unpin(name))

    async def publish(tenant: Tenant, adapter_id: str, body: NewVersion) -> Published | None:
        """None when the body has nothing to publish."""
        if body.path is not None:
            return await publishing.from_path(tenant, adapter_id, body.path, body.labels)
        if body.compose is not None:
            return await publishing.from_parts(tenant, adapter_id, body.compose, body.labels)
        return None

    async def ordered(request: Request, order: Coroutine[Any, Any, AdapterRecord]) -> AdapterObject:
        # The pool may have no room for long; a client that left must not be waited for.
        return await shown_soon(tenant_of(request), await unless_client_leaves(request, order))

    async def shown_soon(tenant: Tenant, record: AdapterRecord) -> AdapterObject:
        return await to_thread.run_sync(describe, service, tenant, record)

    async def answer(tenant: Tenant, published: Published) -> Response:
        """201 with the record of a new version, 200 with that of an old one."""
        adapter = await shown_soon(tenant, published.record)
        body = PublishedAdapter(**adapter.model_dump(), ignored=list(published.ignored))
        return JSONResponse(body.model_dump(), 201 if published.created else 200)

    return router


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    """Raises ApiError for what is not `key:value`, and for a key with two values."""
    labels: dict[str, str] = {}
    for pair in pairs:
        key, colon, value = pair.partition(":")
        if not colon or labels.get(key, value) != value:
            raise ApiError(400, f"label: {shown(pair)} must be key:value, each key once.", "label")
        labels[key] = value
    with adapter_errors("label"):
        return check_labels(labels)
