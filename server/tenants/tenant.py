"""A tenant: what its keys allow."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from polydelta.adapters_store.id_globs import EVERY_ID, matches

# Where the middleware that checks keys leaves the tenant of a request.
TENANT = "polydelta.tenant"


@dataclass(frozen=True)
class Tenant:
    """What an operator wrote down for one customer."""

    name: str
    # SHA-256 of each of its keys.
    key_digests: tuple[bytes, ...] = field(default=(), repr=False)
    # Globs of adapter ids that it may see and use.
    adapters: tuple[str, ...] = ()
    # Globs of ids that it may publish, change and delete; it may use them as well.
    uploads: tuple[str, ...] = ()
    # Of all contents under the ids of `uploads`, in bytes; None: only the store's own quota.
    upload_quota: int | None = None
    # Of prompts and answers together; None: no limit.
    tokens_per_minute: int | None = None
    # Choices of its requests at a time; None: no limit.
    max_concurrent: int | None = None
    # Twice the weight is twice the tokens, where the queue is fair.
    weight: float = 1.0
    # The lowest, and so the best, that its requests may ask for; what they have if they ask for
    # none.
    priority: int = 0
    # Whether its prefix blocks are its own alone, those of the base model as well.
    private_cache: bool = False

    def may_use(self, adapter_id: str) -> bool:
        """Whether it knows of the adapter at all."""
        return matches(adapter_id, self.seen)

    def may_change(self, adapter_id: str) -> bool:
        return matches(adapter_id, self.uploads)

    @property
    def seen(self) -> tuple[str, ...]:
        """Globs of all ids that it knows of."""
        return (*self.adapters, *self.uploads)


# Whoever has an operator's key, or asks a server without tenants: may do everything.
OPERATOR = Tenant(name="", adapters=EVERY_ID, uploads=EVERY_ID)


def digest_of(key: bytes) -> bytes:
    """What of a key is kept, and compared."""
    return hashlib.sha256(key).digest()


def tenant_of(request: HTTPConnection) -> Tenant:
    """Who asks; OPERATOR where keys are not asked for."""
    tenant: Tenant = request.scope.get(TENANT, OPERATOR)
    return tenant
