"""`/metrics` for Prometheus: vLLM's names where they exist, so that its dashboards and routers
work, and `polydelta_` names for what only this server has."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.engine import Engine
    from polydelta.engine.stats import EngineStats

# Seconds.
TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class EngineCollector(Collector):
    """Reads the engine's own counts when Prometheus asks; nothing is counted twice."""

    def __init__(self, engine: Engine, model_name: str, max_adapters: int) -> None:
        self._engine = engine
        self._model_name = model_name
        self._max_adapters = max_adapters

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        yield from self._queue(stats)
        yield from self._work(stats)
        yield from self._pool(stats)
        yield from self._adapters(stats)

    def _queue(self, stats: EngineStats) -> Iterable[Metric]:
        yield self._gauge("vllm:num_requests_running", "Requests running.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting.", stats.num_waiting)
        yield self._gauge(
            "polydelta_requests_waiting_for_adapter",
            "Waiting requests whose adapter is still loading.",
            stats.waiting_for_adapter,
        )
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Share of the pool that KV in use holds.", stats.kv_usage
        )

    def _work(self, stats: EngineStats) -> Iterable[Metric]:
        yield self._counter("vllm:prompt_tokens", "Prompt tokens taken in.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries
        )
        yield self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits
        )
        yield self._counter(
            "vllm:num_preemptions", "Requests stopped to make room.", stats.preemptions
        )
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests finished.", labels=["model_name", "finished_reason"]
        )
        for reason, count in stats.finished.items():
            finished.add_metric([self._model_name, reason], count)
        yield finished

    def _pool(self, stats: EngineStats) -> Iterable[Metric]:
        owners = {
            "free": stats.pages_free,
            "kv": stats.pages_kv,
            "cached": stats.pages_cached,
            "adapters": stats.pages_adapters,
            "adapters_idle": stats.pages_adapters_idle,
        }
        yield self._by_label(
            "polydelta_pool_pages", "Pages of the unified pool by who holds them.", "owner", owners
        )
        yield self._gauge(
            "polydelta_pool_size_pages", "Pages in the unified pool.", stats.pages_total
        )

    def _adapters(self, stats: EngineStats) -> Iterable[Metric]:
        yield self._counter("polydelta_adapter_loads", "Loads into the pool.", stats.adapter_loads)
        yield self._counter(
            "polydelta_adapter_evictions", "Adapters put out of the pool.", stats.adapter_evictions
        )
        yield self._by_label(
            "polydelta_adapter_resident",
            "1 for each adapter that is in the pool.",
            "adapter",
            dict.fromkeys(stats.resident_adapters, 1),
        )
        # Routers read the label lists of the series with the newest value, a time.
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            labels=["model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running, waiting = ",".join(stats.running_adapters), ",".join(stats.waiting_adapters)
        info.add_metric([self._model_name, str(self._max_adapters), running, waiting], time.time())
        yield info

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _by_label(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([self._model_name, key], value)
        return family


class Metrics:
    """The registry, and the latencies that only the HTTP side can see."""

    def __init__(self, engine: Engine, model_name: str, max_adapters: int) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine, model_name, max_adapters))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(model_name)

        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "Request to first token.", REQUEST_BUCKETS
        )
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "Token to next token.", TOKEN_BUCKETS
        )
        self.request_latency = histogram(
            "vllm:e2e_request_latency_seconds", "Request to last token.", REQUEST_BUCKETS
        )

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


def metrics_router(metrics: Metrics) -> APIRouter:
    """`/metrics`, in Prometheus' text format."""
    router = APIRouter(tags=["metrics"])

    @router.get("/metrics")
    async def exposition() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router
