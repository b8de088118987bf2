"""Bearer keys in front of `/v1`, as plain ASGI middleware; probes stay open."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from polydelta.server.errors import error_response
from polydelta.server.tenants.tenant import OPERATOR, TENANT, Tenant, digest_of

GUARDED = "/v1/"
# Tells of everybody's adapters.
METRICS = "/metrics"


class BearerAuth:
    """Lets a guarded request pass when its `Authorization: Bearer` is somebody's key, and leaves in
    the scope whose it is. With tenants, `/metrics` asks for an operator's."""

    def __init__(
        self, app: ASGIApp, operator_keys: Sequence[str], tenants: Sequence[Tenant] = ()
    ) -> None:
        self._app = app
        self._owners = [
            *((digest_of(key.encode()), OPERATOR) for key in operator_keys),
            *((digest, tenant) for tenant in tenants for digest in tenant.key_digests),
        ]
        self._guards_metrics = bool(tenants)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._guards(scope):
            await self._app(scope, receive, send)
            return
        owner = self._owner(Headers(scope=scope))
        if owner is None:
            refusal = error_response(
                401,
                "A valid API key is needed: send the header Authorization: Bearer YOUR_KEY.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send)
        elif scope["path"] == METRICS and owner is not OPERATOR:
            refusal = error_response(
                403, f"{METRICS} tells of all tenants: it asks for an operator's key."
            )
            await refusal(scope, receive, send)
        else:
            scope[TENANT] = owner
            await self._app(scope, receive, send)

    def _guards(self, scope: Scope) -> bool:
        # A browser's preflight carries no credentials.
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            return False
        path = str(scope["path"])
        return path.startswith(GUARDED) or (self._guards_metrics and path == METRICS)

    def _owner(self, headers: Headers) -> Tenant | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Header bytes arrive decoded as latin-1; going back restores a key in UTF-8.
        offered = digest_of(token.strip().encode("latin-1"))
        # Every key is compared, in constant time each: the time taken tells nothing.
        owners = [owner for digest, owner in self._owners if hmac.compare_digest(offered, digest)]
        return owners[0] if owners and scheme.lower() == "bearer" else None
