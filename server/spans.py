"""What a trace tells of a request: a span for the whole of it, and one for each phase of a choice.

Names and attributes are those of OpenTelemetry's semantic conventions for HTTP and generative AI
where they have one, and `polydelta.` ones besides. Prompts and outputs are in none of them.
"""

from __future__ import annotations

import logging
import threading
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Self

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polydelta.server.openai.generation import CLIENT_GONE, TURNED_AWAY
from polydelta.server.tracing import SCOPE_KEY

if TYPE_CHECKING:
    from fastapi import FastAPI

    from polydelta.adapters_store.leases import Lease
    from polydelta.engine.request import RequestOutput
    from polydelta.server.openai.schemas import GenerationFields
    from polydelta.server.openai.usage import UsageCount

# What a stop waits for spans that have not been sent, in seconds.
FLUSH_SECONDS = 2.0
# Text that clients may have written is cut to so many characters.
LONGEST_TEXT = 256


class Tracer:
    """Makes the traces of one application."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("polydelta", version("polydelta"))

    @classmethod
    def to_collector(cls, endpoint: str) -> Self:
        """Spans go to an OTLP/HTTP endpoint, from a thread of their own; those that it does not
        take in time are dropped. The rest is set by the OTEL_ variables."""
        ours = Resource.create(
            {"service.name": "polydelta", "service.version": version("polydelta")}
        )
        # Tells of every try to send a batch; that one was lost is enough.
        logging.getLogger(OTLPSpanExporter.__module__).setLevel(logging.ERROR)
        # Merged last, and so stronger: what the environment says.
        resource = ours.merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        return cls(provider)

    def install(self, app: FastAPI) -> None:
        """Traces the requests to `app`, whatever else stands before its routes by now."""
        app.add_middleware(TraceRequests, tracer=self)

    def begin(self, scope: Scope, route: str) -> RequestTrace | None:
        """None when the request is not sampled."""
        offset = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            TraceContextTextMapPropagator().extract(Headers(scope=scope)),
            otel.SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "http.route": route,
                "url.path": scope["path"][:LONGEST_TEXT],
                "url.scheme": scope["scheme"],
            },
            start_time=time.monotonic_ns() + offset,
        )
        return RequestTrace(self._tracer, span, offset) if span.is_recording() else None

    def shutdown(self) -> None:
        """Sends what is left, but a collector that does not answer holds up no stop."""
        flush = threading.Thread(target=self._provider.shutdown, daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)


class RequestTrace:
    """The span of one request. Belongs to the event loop."""

    def __init__(self, tracer: otel.Tracer, span: otel.Span, offset: int) -> None:
        """offset: from the monotonic clock to Unix time, in nanoseconds; one for the whole trace,
        so that its phases lie within it even when the system's clock is set."""
        self._tracer = tracer
        self._span = span
        self._offset = offset
        self._context = otel.set_span_in_context(span, Context())
        self._usage: UsageCount | None = None
        # Choice -> why it ended.
        self._finish_reasons: dict[int, str] = {}
        self._preemptions = 0
        # What went wrong here, and not with what the client sent: its kind and what it says.
        self._failure: tuple[str, str] | None = None
        self._body_bytes = 0
        # Of the answer; None until it begins.
        self._status: int | None = None
        self._answered = False

    def asked(self, operation: str, body: GenerationFields, max_tokens: int | None) -> None:
        """What the client wants; also of a request that is refused afterwards."""
        model = body.model[:LONGEST_TEXT]
        self._span.update_name(f"{operation} {model}")
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "polydelta",
            "gen_ai.request.model": model,
            "gen_ai.request.choice.count": body.n,
            "gen_ai.request.stream": body.stream,
            "gen_ai.request.temperature": body.temperature,
            "gen_ai.request.top_p": body.top_p,
        }
        if max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = max_tokens
        self._span.set_attributes(attributes)

    def served_by(self, lease: Lease, usage: UsageCount) -> None:
        """usage: read when the request has ended."""
        self._span.set_attribute("gen_ai.response.model", lease.name[:LONGEST_TEXT])
        if lease.shares:
            self._span.set_attribute("polydelta.adapter", lease.name[:LONGEST_TEXT])
        self._usage = usage

    def choice_ended(self, index: int, last: RequestOutput) -> None:
        """Adds the choice's phases: each ends where the next begins, or, if it never did, now."""
        if last.finish_reason is not None:
            self._finish_reasons[index] = last.finish_reason.value
        if last.error is not None and last.error.kind not in TURNED_AWAY:
            self._failure = "engine_error", last.error.message
        times = last.times
        if times is None:
            return
        self._preemptions += times.num_preemptions
        now = time.monotonic()
        for name, start, end in (
            ("queue", times.arrived, times.admitted),
            ("prefill", times.admitted, times.first_token),
            ("decode", times.first_token, times.last_token),
        ):
            if start is not None:
                phase = self._tracer.start_span(
                    name,
                    self._context,
                    attributes={"polydelta.choice": index},
                    start_time=self._unix(start),
                )
                phase.end(self._unix(now if end is None else end))

    def received(self, message: Message) -> None:
        self._body_bytes += len(message.get("body", b""))

    def sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            self._answered = not message.get("more_body", False)

    def failed(self, error: Exception) -> None:
        """An exception that no route expected; it is answered further out."""
        self._span.record_exception(error)
        self._failure = type(error).__qualname__, str(error)
        self._status = self._status or 500

    def end(self) -> None:
        attributes: dict[str, AttributeValue] = {"http.request.body.size": self._body_bytes}
        if self._status is not None:
            attributes["http.response.status_code"] = self._status
        if self._finish_reasons:
            attributes["gen_ai.response.finish_reasons"] = [
                reason for _, reason in sorted(self._finish_reasons.items())
            ]
            attributes["polydelta.preemptions"] = self._preemptions
        if self._usage is not None:
            usage = self._usage.usage()
            attributes["gen_ai.usage.input_tokens"] = usage.prompt_tokens
            attributes["gen_ai.usage.output_tokens"] = usage.completion_tokens
        if error_type := self._error_type():
            attributes["error.type"] = error_type
        self._span.set_attributes(attributes)
        if self._failure is not None:
            self._span.set_status(otel.StatusCode.ERROR, self._failure[1][:LONGEST_TEXT])
        elif self._status is not None and self._status >= 500:
            self._span.set_status(otel.StatusCode.ERROR)
        self._span.end(self._unix(time.monotonic()))

    def _error_type(self) -> str | None:
        if self._failure is not None:
            return self._failure[0]
        # A stream that is cut off, by its client or by the server's stop, had begun with a 200.
        if not self._answered or self._status == CLIENT_GONE:
            return "cancelled"
        return str(self._status) if self._status is not None and self._status >= 400 else None

    def _unix(self, seconds: float) -> int:
        """Monotonic seconds as Unix time in nanoseconds."""
        return round(seconds * 1e9) + self._offset


class TraceRequests:
    """ASGI middleware: traces what generates text and what uploads adapters."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = _traced_route(scope)
        trace = None if route is None else self._tracer.begin(scope, route)
        if trace is None:
            await self._app(scope, receive, send)
            return
        scope[SCOPE_KEY] = trace

        async def traced_receive() -> Message:
            message = await receive()
            trace.received(message)
            return message

        async def traced_send(message: Message) -> None:
            await send(message)
            trace.sent(message)

        try:
            await self._app(scope, traced_receive, traced_send)
        except Exception as error:
            trace.failed(error)
            raise
        finally:
            trace.end()


def _traced_route(scope: Scope) -> str | None:
    if scope["type"] != "http":
        return None
    path = str(scope["path"])
    match scope["method"]:
        case "POST" if path in ("/v1/completions", "/v1/chat/completions", "/v1/adapters"):
            return path
        case "PUT" if path.startswith("/v1/adapters/"):
            return "/v1/adapters/{name}"
    return None
