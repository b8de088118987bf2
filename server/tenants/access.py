"""What a tenant may do with which adapter. What it may not see is answered like what is not there:
in the same words, after the same work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import uuid4

from fastapi import Request

from polydelta.adapters_store.allowance import Allowance
from polydelta.adapters_store.reference import AdapterName, parse_name
from polydelta.server.errors import ApiError
from polydelta.server.tenants.tenant import OPERATOR, Tenant, tenant_of

if TYPE_CHECKING:  # it imports torch, which the routes do not need
    from polydelta.adapters_store.store import AdapterStore

# No adapter's id: none begins with a hyphen, and no folder is called this by chance.
NOBODY = f"-{uuid4().hex}"


def looked_up(tenant: Tenant, text: str) -> AdapterName:
    """What is looked up for a name that a tenant asks for. In place of one that it may not use,
    that is one that nobody has, which errors call what the tenant called it.

    Raises UnknownAdapterError for what can be no adapter's name.
    """
    name = parse_name(text)
    if tenant.may_use(name.id):
        return name
    return AdapterName(NOBODY, name.version, called=name.id)


def to_change(tenant: Tenant, text: str) -> AdapterName:
    """As `looked_up`, of what is to be changed. Raises ApiError 403 for what the tenant may only
    use."""
    name = looked_up(tenant, text)
    if name.id != NOBODY and not tenant.may_change(name.id):
        raise ApiError(403, f"{text!r} is not yours to change: your key may only use it.", "id")
    return name


def check_uploads(tenant: Tenant) -> None:
    """Raises ApiError 403 for a tenant that may publish nothing."""
    if not tenant.uploads:
        raise ApiError(403, "Your key may not publish adapters: ask the operator.")


def check_upload(tenant: Tenant, adapter_id: str) -> None:
    """Raises ApiError 403 for an id that the tenant may not publish as, there or not."""
    if not tenant.may_change(adapter_id):
        raise ApiError(
            403,
            f"id: your key may not publish an adapter as {adapter_id!r}: take another id.",
            "id",
        )


def check_parts(tenant: Tenant, store: AdapterStore, names: Iterable[AdapterName]) -> None:
    """Raises ApiError 403 for a part in an operator's folder: a saved composition takes it over
    into the store, which is a change. UnknownAdapterError for one that is not there."""
    if tenant is OPERATOR:
        return
    for name in names:
        if store.resolve(name).digest is None and not tenant.may_change(name.id):
            raise ApiError(
                403,
                f"compose: '{name}' is served from a folder of the operator's, and your key may "
                "not move it into the store: add it up request by request, by the field adapters.",
                "compose",
            )


def allowance_of(tenant: Tenant) -> Allowance | None:
    """What it may upload; None for an operator, who has the store's quota alone."""
    return None if tenant is OPERATOR else Allowance(tenant.uploads, tenant.upload_quota)


async def operators_only(request: Request) -> None:
    """A dependency of routes. Raises ApiError 403 for every tenant, whatever it asks for."""
    check_operator(tenant_of(request))


def check_operator(tenant: Tenant, param: str | None = None) -> None:
    """Raises ApiError 403. param: the field of the request that only operators may give."""
    if tenant is not OPERATOR:
        what = "This" if param is None else f"{param}: this"
        raise ApiError(403, f"{what} is for operators' keys only.", param)
