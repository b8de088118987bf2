"""Adapters as the API shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel

from polydelta.adapters_store.records import AdapterRecord, Part
from polydelta.adapters_store.reference import AdapterRef
from polydelta.server.adapters.errors import adapter_errors
from polydelta.server.service import Service
from polydelta.server.tenants.tenant import Tenant

DELETED = "deleted"


class Residency(BaseModel):
    # "on disk", "loading to host", "on host", "resident", "failed"
    state: str
    # Of the pool.
    pages: int
    # Sequences that run with it.
    users: int


class CompositionPart(BaseModel):
    id: str
    version: int
    weight: float
    # None when it was deleted together with the composition.
    residency: Residency | None


class AdapterObject(BaseModel):
    """One version of an adapter."""

    id: str
    object: Literal["adapter"]
    version: int
    # `id@version`
    name: str
    # Of the content; None for what cannot be read.
    sha256: str | None
    # "LORA", "SHIRA", "COMPOSITION"; None for what cannot be read.
    format: str | None
    kinds: list[str]
    # The largest; 0 when no delta has a rank.
    rank: int
    # Linear layers that it changes.
    modules: int
    # Of its files.
    bytes: int
    # Fingerprint of the base model that it was checked against; None before it is.
    base: str | None
    # Unix time.
    created: int
    labels: Mapping[str, str]
    # "ready", "deleting", "deleted", or "invalid" with a problem.
    state: str
    problem: str | None
    # "upload", "path", "rollback", "composition", "folder" (served where the operator put it), or
    # "adopted" (taken over from there).
    source: str
    pinned: bool
    # Requests so far, and when the latest one began.
    uses: int
    last_used: int | None
    # Requests that use it now.
    active_requests: int
    # Of a composition, those that the key may use; others have none.
    parts: list[CompositionPart]
    # None for a composition: each of its parts has its own.
    residency: Residency | None


class PublishedAdapter(AdapterObject):
    """A version that was sent."""

    # Files that came along and are not kept.
    ignored: list[str]


class AdapterPage(BaseModel):
    object: Literal["list"]
    data: list[AdapterObject]
    has_more: bool
    # To be given as `after` for the next page.
    last_id: str | None


class AdapterList(BaseModel):
    object: Literal["list"]
    data: list[AdapterObject]


def describe(
    service: Service, tenant: Tenant, record: AdapterRecord, state: str | None = None
) -> AdapterObject:
    """A record with what is known only now, as a tenant may see it. state: in place of the
    record's.

    Raises ApiError when the catalog does not answer.
    """
    facts = record.facts
    ref = service.store.ref(record)
    with adapter_errors():
        parts = [_part(service, part) for part in record.parts if tenant.may_use(part.id)]
    return AdapterObject(
        id=record.id,
        object="adapter",
        version=record.version,
        name=record.name,
        sha256=record.digest or None,
        format=facts.format or None,
        kinds=list(facts.kinds),
        rank=facts.rank,
        modules=facts.modules,
        bytes=facts.nbytes,
        base=record.base or None,
        created=int(record.created),
        labels=record.labels,
        state=state or record.state.value,
        problem=record.problem,
        source=record.source.value,
        pinned=record.pinned,
        uses=record.uses,
        last_used=None if record.last_used is None else int(record.last_used),
        active_requests=service.store.users(record),
        parts=parts,
        residency=None if record.parts else _residency(service, ref),
    )


def _part(service: Service, part: Part) -> CompositionPart:
    record = service.store.catalog.find(part.id, part.version)
    return CompositionPart(
        id=part.id,
        version=part.version,
        weight=part.weight,
        residency=None if record is None else _residency(service, service.store.ref(record)),
    )


def _residency(service: Service, ref: AdapterRef) -> Residency:
    place = service.engine.adapter_place(ref)
    return Residency(state=place.state.value, pages=place.pages, users=place.users)
