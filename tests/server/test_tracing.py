"""Traces: what the spans of a request say, and how they reach a collector."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from polydelta.engine.request import (
    ErrorKind,
    GenerationRequest,
    OutputHandler,
    RequestOutput,
    RequestTimes,
)
from polydelta.server import spans
from polydelta.server.settings import SettingsError, load_settings
from polydelta.server.spans import Tracer
from polydelta.server.tracing import open_tracer

TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{CALLER}-01"}
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
# Seconds from one to the next of: arrived, admitted, first token, last token.
STEPS = (0.5, 0.25, 1.0)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(
    make_app: Callable[..., FastAPI], exporter: InMemorySpanExporter, engine: Any
) -> TestClient:
    """A client of an application whose spans can be read, over an engine that gives times."""
    submit = engine.submit

    def submit_timed(request: GenerationRequest, on_output: OutputHandler) -> None:
        def hand_on(output: RequestOutput) -> None:
            on_output(replace(output, times=times(request)) if output.finished else output)

        submit(request, hand_on)

    engine.submit = submit_timed
    return TestClient(with_tracer(make_app(), exporter), raise_server_exceptions=False)


def with_tracer(app: FastAPI, exporter: InMemorySpanExporter) -> FastAPI:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Tracer(provider).install(app)
    return app


def times(request: GenerationRequest) -> RequestTimes:
    queue, prefill, decode = STEPS
    arrived = request.arrived - sum(STEPS)
    admitted = arrived + queue
    first = admitted + prefill
    return RequestTimes(arrived, admitted, first, first + decode, 2, 5, 1)


def ask(client: TestClient, path: str = "/v1/completions", **fields: object) -> Any:
    asked: dict[str, object] = (
        {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    )
    headers = fields.pop("headers", {})
    body = {"model": "fake-base"} | asked | fields
    return client.post(path, json=body, headers=headers)


def request_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = [one for one in exporter.get_finished_spans() if one.kind is SpanKind.SERVER]
    return span


def phases(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    found = [one for one in exporter.get_finished_spans() if one.kind is SpanKind.INTERNAL]
    return sorted(found, key=lambda one: (one.attributes["polydelta.choice"], one.start_time))


def test_a_completion_is_a_span_with_what_was_asked_and_what_came(traced, exporter):
    ask(traced, max_tokens=3, temperature=0.5, top_p=0.9)
    span = request_span(exporter)
    assert span.name == "text_completion fake-base"
    attributes = dict(span.attributes)
    assert attributes.pop("http.request.body.size") > 40
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "polydelta",
        "gen_ai.request.model": "fake-base",
        "gen_ai.response.model": "fake-base",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "polydelta.preemptions": 1,
    }
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_each_choice_has_its_phases_whole_or_streamed(traced, exporter, path, stream):
    before = time.time_ns()
    assert ask(traced, path, n=2, stream=stream).status_code == 200
    span = request_span(exporter)
    assert span.attributes["gen_ai.usage.output_tokens"] == 10
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop", "stop")
    assert before <= span.start_time <= span.end_time <= time.time_ns()
    found = phases(exporter)
    assert [one.name for one in found] == ["queue", "prefill", "decode"] * 2
    assert [one.attributes["polydelta.choice"] for one in found] == [0] * 3 + [1] * 3
    for one, seconds in zip(found, STEPS * 2, strict=True):
        assert one.parent.span_id == span.context.span_id
        assert one.context.trace_id == span.context.trace_id
        assert (one.end_time - one.start_time) / 1e9 == pytest.approx(seconds, abs=1e-6)
    assert found[0].end_time == found[1].start_time
    # The engine's clock is another one: its last token came when the request was made.
    assert abs(found[2].end_time - span.start_time) / 1e9 < 5


def test_a_chat_is_called_so_and_takes_either_name_of_its_limit(traced, exporter):
    ask(traced, "/v1/chat/completions", model="dates", max_completion_tokens=7)
    span = request_span(exporter)
    assert span.name == "chat dates"
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["gen_ai.request.max_tokens"] == 7
    assert span.attributes["gen_ai.response.model"] == "dates@1"
    assert span.attributes["polydelta.adapter"] == "dates@1"


def test_a_span_goes_on_with_the_trace_of_the_caller(traced, exporter):
    ask(traced, headers=SAMPLED)
    span = request_span(exporter)
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == CALLER


def test_without_a_caller_or_with_a_broken_one_a_trace_begins(traced, exporter):
    ask(traced)
    ask(traced, headers={"traceparent": "00-0-0-01"})
    first, second = [one for one in exporter.get_finished_spans() if one.kind is SpanKind.SERVER]
    assert first.parent is None
    assert second.parent is None
    assert first.context.trace_id != second.context.trace_id


def test_a_caller_that_does_not_sample_is_not_traced(traced, exporter):
    answer = ask(traced, headers={"traceparent": f"00-{TRACE_ID}-{CALLER}-00"})
    assert answer.status_code == 200
    assert exporter.get_finished_spans() == ()


def test_a_phase_that_never_ended_ends_with_the_choice(traced, exporter, engine, monkeypatch):
    monkeypatch.setattr(
        f"{__name__}.times", lambda request: replace(never, arrived=request.arrived)
    )
    never = RequestTimes(0.0, None, None, None, 2, 0, 0)
    engine.error = "no room"
    ask(traced)
    (queue,) = phases(exporter)
    assert queue.name == "queue"
    assert queue.start_time <= queue.end_time <= request_span(exporter).end_time


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_cannot_serve_is_an_error_whatever_the_status_line_said(
    traced, exporter, engine, stream
):
    engine.error, engine.error_after = "the weights are gone", 2
    answer = ask(traced, stream=stream)
    span = request_span(exporter)
    assert span.attributes["http.response.status_code"] == answer.status_code
    assert span.attributes["error.type"] == "engine_error"
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert span.attributes["gen_ai.usage.output_tokens"] == 2
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "the weights are gone"


def test_a_refusal_is_the_clients_error_and_says_what_was_asked(traced, exporter):
    assert ask(traced, model="nobody").status_code == 404
    span = request_span(exporter)
    assert span.name == "text_completion nobody"
    assert span.attributes["http.response.status_code"] == 404
    assert span.attributes["error.type"] == "404"
    assert "gen_ai.response.model" not in span.attributes
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (ErrorKind.LATE, 429, StatusCode.UNSET),
        (ErrorKind.QUEUE_FULL, 503, StatusCode.ERROR),
    ],
)
def test_a_busy_server_s_refusal_has_its_status(
    traced, exporter, engine, kind, status, code, stream
):
    engine.error, engine.error_kind = "too much to do", kind
    assert ask(traced, stream=stream).status_code == status
    span = request_span(exporter)
    assert span.attributes["error.type"] == str(status)
    assert span.status.status_code is code


def test_a_body_that_is_no_request_has_the_name_of_its_route(traced, exporter):
    assert traced.post("/v1/completions", content=b"{").status_code == 400
    span = request_span(exporter)
    assert span.name == "POST /v1/completions"
    assert span.attributes["http.request.body.size"] == 1


def test_a_refusal_for_want_of_a_key_is_traced_too(make_app, exporter):
    client = TestClient(with_tracer(make_app(api_key=("key",)), exporter))
    assert ask(client).status_code == 401
    assert request_span(exporter).attributes["error.type"] == "401"


def test_an_engine_that_has_stopped_is_an_error(traced, exporter, engine):
    engine.alive = False
    assert ask(traced).status_code == 503
    span = request_span(exporter)
    assert span.attributes["error.type"] == "503"
    assert span.status.status_code is StatusCode.ERROR


def test_a_bug_is_an_error_with_its_traceback(traced, exporter, engine):
    def broken(text: str) -> list[int]:
        raise ZeroDivisionError("no such luck")

    engine.tokenizer.encode = broken
    assert ask(traced).status_code == 500
    span = request_span(exporter)
    assert span.attributes["http.response.status_code"] == 500
    assert span.attributes["error.type"] == "ZeroDivisionError"
    assert span.status.status_code is StatusCode.ERROR
    assert "test_tracing.py" in span.events[0].attributes["exception.stacktrace"]


def test_a_long_name_is_cut(traced, exporter):
    ask(traced, model="x" * 9999)
    assert request_span(exporter).attributes["gen_ai.request.model"] == "x" * spans.LONGEST_TEXT


def test_a_client_that_hangs_up_leaves_a_span_of_what_it_got(make_app, exporter, engine):
    engine.endless = True
    app = with_tracer(make_app(), exporter)
    hang_up(app, b'{"model": "fake-base", "prompt": "Hi", "stream": true}')
    span = request_span(exporter)
    assert span.attributes["error.type"] == "cancelled"
    assert span.attributes["gen_ai.usage.output_tokens"] >= 1
    assert span.status.status_code is StatusCode.UNSET


def hang_up(app: FastAPI, body: bytes) -> None:
    """Asks for a stream and leaves after its first event."""

    async def call() -> None:
        some, asked = asyncio.Event(), False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body}
            await some.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                some.set()

        await app(
            {
                "type": "http",
                "method": "POST",
                "path": "/v1/completions",
                "scheme": "http",
                "query_string": b"",
                "headers": [(b"content-type", b"application/json")],
                "asgi": {"version": "3.0", "spec_version": "2.3"},
            },
            receive,
            send,
        )

    asyncio.run(asyncio.wait_for(call(), 10))


def test_uploads_are_spans_with_their_size_and_outcome(traced, exporter):
    assert traced.post("/v1/adapters", json={"id": "mine"}).status_code == 400
    assert traced.put("/v1/adapters/mine", json={}).status_code == 400
    first, second = exporter.get_finished_spans()
    assert (first.name, second.name) == ("POST /v1/adapters", "PUT /v1/adapters/{name}")
    assert first.attributes["http.request.body.size"] == len('{"id":"mine"}')
    assert second.attributes["url.path"] == "/v1/adapters/mine"
    assert second.attributes["error.type"] == "400"


def test_probes_metrics_and_lists_are_not_traced(traced, exporter):
    for path in ("/health", "/ready", "/metrics", "/version", "/v1/models"):
        assert traced.get(path).status_code == 200
    assert exporter.get_finished_spans() == ()


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes one export and keeps it."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers), content))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.got = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_what_is_left_is_sent_to_the_collector_when_the_server_stops(
    make_app, collector, monkeypatch
):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "our-models")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
    url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    app = make_app()
    with open_tracer(load_settings(otlp_traces_endpoint=url).otlp_traces_endpoint) as tracer:
        tracer.install(app)
        ask(TestClient(app))
        assert collector.got == []
    ((path, headers, content),) = collector.got
    assert path == "/v1/traces"
    assert headers["x-tenant"] == "blue"
    (sent,) = ExportTraceServiceRequest.FromString(content).resource_spans
    service = {one.key: one.value.string_value for one in sent.resource.attributes}
    assert service["service.name"] == "our-models"
    assert [span.name for span in sent.scope_spans[0].spans] == ["text_completion fake-base"]


def test_a_collector_that_never_answers_holds_up_neither_requests_nor_the_stop(
    make_app, monkeypatch
):
    monkeypatch.setattr(spans, "FLUSH_SECONDS", 0.2)
    released = threading.Event()
    exports = []

    class Deaf(InMemorySpanExporter):
        def export(self, spans: Any) -> Any:
            exports.append(spans)
            released.wait(20)
            return super().export(spans)

    monkeypatch.setattr(spans, "OTLPSpanExporter", lambda endpoint: Deaf())
    app = make_app()
    began = time.monotonic()
    with open_tracer(
        load_settings(otlp_traces_endpoint="http://x/").otlp_traces_endpoint
    ) as tracer:
        tracer.install(app)
        assert ask(TestClient(app)).status_code == 200
    assert exports
    assert time.monotonic() - began < 15
    released.set()


def test_without_an_endpoint_there_is_no_tracer():
    with open_tracer(load_settings().otlp_traces_endpoint) as tracer:
        assert tracer is None


def test_without_the_extra_the_option_is_refused_with_what_to_install(polydelta, monkeypatch):
    # Both as if nobody had loaded them yet; the second cannot be.
    monkeypatch.delitem(sys.modules, "polydelta.server.spans")
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    code, _, err = polydelta("serve", "--otlp-traces-endpoint", "http://localhost:4318/v1/traces")
    assert code == 1
    assert "pip install 'polydelta[tracing]'" in err
    assert "--otlp-traces-endpoint" in err
    assert err.count("\n") == 1


def test_a_wrong_endpoint_is_a_settings_error():
    with pytest.raises(SettingsError, match="POLYDELTA_OTLP_TRACES_ENDPOINT"):
        load_settings(otlp_traces_endpoint="collector:4318")


def test_the_server_needs_no_opentelemetry_without_the_option():
    program = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "import polydelta.server.app, polydelta.server.cli"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
