"""How many requests were answered with an error, and why."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polydelta.server.lifecycle import PROBES

# Where whoever refuses a request may leave a reason that says more than the status.
REASON = "polydelta.refusal"

REASONS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "not_found",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    422: "bad_request",
    429: "overload",
    499: "client_left",
    503: "unavailable",
}
# Reasons of their own, which whoever refuses leaves in REASON.
LATE = "late"
QUEUE_FULL = "queue_full"
TENANT_RATE = "tenant_rate"
TENANT_CONCURRENCY = "tenant_concurrency"
# Refusals that another try, later, may not meet.
REJECTIONS = (
    (429, REASONS[429]),
    (429, LATE),
    (429, TENANT_RATE),
    (429, TENANT_CONCURRENCY),
    (503, REASONS[503]),
    (503, QUEUE_FULL),
)
REJECTED = frozenset(status for status, _ in REJECTIONS)


class Refusals:
    """Counts; belongs to the event loop."""

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._model_name = model_name
        self._refusals = Counter(
            "polydelta_refusals",
            "Requests answered with an error.",
            ["model_name", "status", "reason"],
            registry=registry,
        )
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests answered with 429 or 503: they may be sent again, later or elsewhere.",
            ["model_name", "engine", "reason"],
            registry=registry,
        )
        # A series that begins with its first refusal would hide it from whoever looks at rates.
        for _, reason in REJECTIONS:
            self._rejections.labels(model_name, "0", reason)
        for status, reason in (*REASONS.items(), *REJECTIONS):
            self._refusals.labels(model_name, str(status), reason)

    def count(self, status: int, reason: str | None = None) -> None:
        """reason: where there is a better one than the status gives."""
        why = reason or REASONS.get(status, "bad_request" if status < 500 else "internal")
        self._refusals.labels(self._model_name, str(status), why).inc()
        if status in REJECTED:
            self._rejections.labels(self._model_name, "0", why).inc()


class CountRefusals:
    """ASGI middleware: counts every response with the status of an error."""

    def __init__(self, app: ASGIApp, refusals: Refusals) -> None:
        self._app = app
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return

        began = False

        async def watched(message: Message) -> None:
            nonlocal began
            began = True
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._refusals.count(message["status"], scope.get(REASON))
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            # A bug of ours is answered further out, with a 500.
            if not began:
                self._refusals.count(500)
            raise
