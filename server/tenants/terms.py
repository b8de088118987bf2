"""On what terms a tenant's request waits and shares: what the engine knows of whose it is."""

from __future__ import annotations

from typing import TypedDict

from polydelta.server.errors import ApiError
from polydelta.server.openai.schemas import GenerationFields
from polydelta.server.tenants.tenant import OPERATOR, Tenant


class Terms(TypedDict):
    """Fields of a GenerationRequest."""

    tenant: str
    weight: float
    priority: int
    cache_salt: str


def terms_of(tenant: Tenant, body: GenerationFields) -> Terms:
    """Raises ApiError 400 for a priority that the tenant may not have."""
    return Terms(
        tenant=tenant.name,
        weight=tenant.weight,
        priority=_priority(tenant, body),
        cache_salt=_cache_salt(tenant, body.cache_salt),
    )


def _priority(tenant: Tenant, body: GenerationFields) -> int:
    if "priority" not in body.model_fields_set:
        return tenant.priority
    if tenant is not OPERATOR and body.priority < tenant.priority:
        raise ApiError(
            400,
            f"priority: {body.priority} goes before {tenant.priority}, which is the best that this "
            f"key may ask for; ask for {tenant.priority} or more, or leave it out.",
            "priority",
        )
    return body.priority


def _cache_salt(tenant: Tenant, salt: str) -> str:
    """No tenant can write the salt of another one's private cache: what it asks for stands behind
    the first colon, and no tenant's name has one. An operator's may be anything."""
    if tenant is OPERATOR:
        return salt
    if tenant.private_cache:
        return f"{tenant.name}:{salt}"
    return f":{salt}" if salt else ""
