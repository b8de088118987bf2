"""`/v1/adapters`: versions made, shown, loaded, pinned, rolled back, deleted.

Plain functions run in threads of FastAPI's; the others never wait for a disk or a database.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from polydelta.adapters_store.delta_kinds import KINDS
from polydelta.adapters_store.labels import check_labels
from polydelta.adapters_store.records import AdapterRecord, VersionState
from polydelta.adapters_store.reference import is_id, parse_name
from polydelta.server.adapters.bodies import described, is_form, read_json
from polydelta.server.adapters.changes import Changes, plain_id
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

if TYPE_CHECKING:  # what checks an upload imports torch, which the routes do not need
    from polydelta.adapters_store.upload.publisher import Published


def adapters_router(service: Service, publishing: Publishing, changes: Changes) -> APIRouter:
    # Here and not above: looking into adapters imports torch, which takes seconds.
    from polydelta.adapters_store.listing import AdapterListing

    router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
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
        if is_form(request):
            return await answer(await publishing.from_form(request, None))
        body = await read_json(request, CreateAdapter)
        published = await publish(body.id, body)
        if published is None:
            raise ApiError(
                400, "compose: give this field or path, or send the files as a form.", "compose"
            )
        return await answer(published)

    @router.put("/{name}", response_model=PublishedAdapter, openapi_extra=described(NewVersion))
    async def put_adapter(name: str, request: Request) -> Response:
        """As POST, under the id in the path. With `labels` alone, those of the newest version or of
        `id@version` are replaced."""
        if is_form(request):
            return await answer(await publishing.from_form(request, name))
        body = await read_json(request, NewVersion)
        published = await publish(name, body)
        if published is not None:
            return await answer(published)
        if body.labels is None:
            raise ApiError(400, "labels: give this field, compose or path.", "labels")
        record = await to_thread.run_sync(changes.label, name, body.labels)
        return JSONResponse((await shown_soon(record)).model_dump())

    @router.get("")
    def list_adapters(query: Annotated[ListQuery, Query()]) -> AdapterPage:
        """The newest ready version of each id, by id, those in the operator's folders included."""
        if query.after is not None and not is_id(query.after):
            raise ApiError(400, f"after: {shown(query.after)} is no adapter id.", "after")
        if query.kind not in (None, *KINDS):
            kinds = ", ".join(KINDS)
            raise ApiError(400, f"kind: {shown(query.kind)} is none of {kinds}.", "kind")
        labels = _labels(query.label)
        with adapter_errors():
            service.store.try_to_flush()
            records = listing.page(query.after or "", query.limit + 1, labels, query.kind)
        data = [describe(service, record) for record in records[: query.limit]]
        return AdapterPage(
            object="list",
            data=data,
            has_more=len(records) > query.limit,
            last_id=data[-1].id if data else None,
        )

    @router.get("/{name}")
    def show_adapter(name: str) -> AdapterObject:
        """The newest version, or `id@version`."""
        with adapter_errors("id"):
            service.store.try_to_flush()
            return describe(service, listing.record(parse_name(name)))

    @router.get("/{adapter_id}/versions")
    def list_versions(adapter_id: str) -> AdapterList:
        """All versions, oldest first."""
        with adapter_errors("id"):
            service.store.try_to_flush()
            records = listing.versions(plain_id(adapter_id).id)
        return AdapterList(object="list", data=[describe(service, record) for record in records])

    @router.delete("/{name}")
    def delete_adapter(name: str, query: Annotated[DeleteQuery, Query()]) -> AdapterList:
        """One version (`id@version`), or all of an id.

        Those that requests use are not deleted (409), or with `in_use=defer` when these are done.
        """
        data = [
            describe(service, record, None if record.state is VersionState.DELETING else DELETED)
            for record in changes.delete(name, defer=query.in_use == "defer")
        ]
        return AdapterList(object="list", data=data)

    @router.post("/{adapter_id}/rollback", status_code=201)
    def roll_back(adapter_id: str, body: Rollback, response: Response) -> AdapterObject:
        """An older version's content as the newest version, with a new number.

        200 when the newest version already is that content.
        """
        record, created = changes.roll_back(adapter_id, body.version)
        if not created:
            response.status_code = 200
        return describe(service, record)

    @router.post("/{name}/load")
    async def load_adapter(name: str, request: Request) -> AdapterObject:
        """Into the pool, before anybody asks for it; of a composition, all parts."""
        return await ordered(request, orders.load(name))

    @router.post("/{name}/evict")
    async def evict_adapter(name: str, request: Request) -> AdapterObject:
        """Out of the pool and out of host memory; 409 while it is used or pinned."""
        return await ordered(request, orders.evict(name))

    @router.post("/{name}/pin")
    async def pin_adapter(name: str, request: Request) -> AdapterObject:
        """Into the pool, to stay there, after a restart too."""
        return await ordered(request, orders.pin(name))

    @router.post("/{name}/unpin")
    async def unpin_adapter(name: str, request: Request) -> AdapterObject:
        """The pool may evict it again."""
        return await ordered(request, orders.unpin(name))

    async def publish(adapter_id: str, body: NewVersion) -> Published | None:
        """None when the body has nothing to publish."""
        if body.path is not None:
            return await publishing.from_path(adapter_id, body.path, body.labels)
        if body.compose is not None:
            return await publishing.from_parts(adapter_id, body.compose, body.labels)
        return None

    async def ordered(request: Request, order: Coroutine[Any, Any, AdapterRecord]) -> AdapterObject:
        # The pool may have no room for long; a client that left must not be waited for.
        return await shown_soon(await unless_client_leaves(request, order))

    async def shown_soon(record: AdapterRecord) -> AdapterObject:
        return await to_thread.run_sync(describe, service, record)

    async def answer(published: Published) -> Response:
        """201 with the record of a new version, 200 with that of an old one."""
        adapter = await shown_soon(published.record)
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
