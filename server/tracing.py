"""Traces for an OpenTelemetry collector, where one was named; nothing of it is loaded elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastapi import Request
from pydantic import AnyHttpUrl

from polydelta.server.settings import SettingsError

if TYPE_CHECKING:  # these import OpenTelemetry, which is an extra
    from polydelta.server.spans import RequestTrace, Tracer

# Where a request's trace stands in its ASGI scope.
SCOPE_KEY = "polydelta.trace"


@contextmanager
def open_tracer(endpoint: AnyHttpUrl | None) -> Iterator[Tracer | None]:
    """What makes spans and sends them to `endpoint` in the background; None without one.

    On exit what has not been sent is, for a few seconds at most. Raises SettingsError when the
    extra is not installed.
    """
    if endpoint is None:
        yield None
        return
    try:
        from polydelta.server.spans import Tracer
    except ImportError as error:
        raise SettingsError(
            f"--otlp-traces-endpoint needs OpenTelemetry ({error}): "
            "pip install 'polydelta[tracing]', or leave the option out."
        ) from None
    tracer = Tracer.to_collector(str(endpoint))
    try:
        yield tracer
    finally:
        tracer.shutdown()


def trace_of(request: Request) -> RequestTrace | None:
    """What the request's handler adds its facts to; None when the request is not traced."""
    trace: RequestTrace | None = request.scope.get(SCOPE_KEY)
    return trace
