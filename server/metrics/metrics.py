"""The registry, and the route: vLLM's names where they exist, so that its dashboards and routers
work, and `polydelta_` names for what only this server has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from polydelta.server.metrics.own_metrics import OwnMetrics
from polydelta.server.metrics.refusals import Refusals
from polydelta.server.metrics.vllm_metrics import VllmMetrics

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.engine import Engine

CHOICES = (1, 2, 5, 10, 20, 50, 100)


class EngineCollector(Collector):
    """Reads the engine's own counts when Prometheus asks; nothing is counted twice."""

    def __init__(
        self, engine: Engine, vllm: VllmMetrics, own: OwnMetrics, is_ready: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._vllm = vllm
        self._own = own
        self._is_ready = is_ready

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        yield from self._vllm.of(stats)
        yield from self._own.of(stats, self._engine.pool_bytes, self._is_ready())

    def describe(self) -> Iterable[Metric]:
        # To be registered is no reason to ask the engine, which does not run yet.
        return ()


class Metrics:
    """All that is measured of one server."""

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        dtype: str,
        most_named: int,
        is_ready: Callable[[], bool],
    ) -> None:
        """dtype: of KV; most_named: adapters with series of their own, at most; is_ready: whether
        new requests are taken."""
        self._registry = CollectorRegistry()
        vllm = VllmMetrics(model_name, dtype, engine.kv_setup, engine.max_batch_size)
        own = OwnMetrics(model_name, most_named)
        self._registry.register(EngineCollector(engine, vllm, own, is_ready))
        ProcessCollector(registry=self._registry)
        self.refusals = Refusals(model_name, self._registry)
        self._choices = Histogram(
            "vllm:request_params_n",
            "Choices that a prompt was to get.",
            ["model_name", "engine"],
            buckets=CHOICES,
            registry=self._registry,
        ).labels(model_name, "0")

    def asked(self, choices: int, prompts: int) -> None:
        """So many prompts were accepted, each for so many answers."""
        for _ in range(prompts):
            self._choices.observe(choices)

    def exposition(self) -> bytes:
        """Waits for the engine's step at hand."""
        return generate_latest(self._registry)


def metrics_router(metrics: Metrics) -> APIRouter:
    """`/metrics`, in Prometheus' text format."""
    router = APIRouter(tags=["metrics"])

    @router.get("/metrics")
    async def exposition() -> Response:
        """Everything that is counted, as of now."""
        content = await asyncio.to_thread(metrics.exposition)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return router
