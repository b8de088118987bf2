"""Bearer keys in front of `/v1`, as plain ASGI middleware; probes and metrics stay open."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from polydelta.server.errors import error_response

GUARDED = "/v1/"


class BearerAuth:
    """Lets a guarded request pass when its `Authorization: Bearer` is one of `keys`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._guards(scope) and not self._knows(Headers(scope=scope)):
            refusal = error_response(
                401,
                "A valid API key is needed: send the header Authorization: Bearer YOUR_KEY.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _guards(self, scope: Scope) -> bool:
        # A browser's preflight carries no credentials.
        return (
            scope["type"] == "http"
            and str(scope["path"]).startswith(GUARDED)
            and scope["method"] != "OPTIONS"
        )

    def _knows(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Header bytes arrive decoded as latin-1; going back restores a key in UTF-8.
        offered = token.strip().encode("latin-1")
        # Every key is compared, in constant time each: the time taken tells nothing.
        matches = [hmac.compare_digest(offered, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)
