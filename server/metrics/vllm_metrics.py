"""The names that vLLM's dashboards and the Kubernetes inference gateway read."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric

from polydelta.server.metrics.families import Families, by_one

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.kv_setup import KVSetup
    from polydelta.engine.stats import EngineStats

# Of the engine's distributions.
TEXTS = {
    "time_to_first_token_seconds": "Request to first token.",
    "inter_token_latency_seconds": "Token to next token.",
    "request_time_per_output_token_seconds": "Mean time from token to token of a request.",
    "e2e_request_latency_seconds": "Request to last token.",
    "request_queue_time_seconds": "Request to its first step.",
    "request_inference_time_seconds": "First step to last token.",
    "request_prefill_time_seconds": "First step to first token.",
    "request_decode_time_seconds": "First token to last token.",
    "request_prompt_tokens": "Tokens of a prompt.",
    "request_generation_tokens": "Tokens of an answer.",
    "request_params_max_tokens": "Most tokens that a request asked for, within the window.",
    "request_num_preemptions": "How often a request was preempted.",
}


class VllmMetrics:
    """Of one engine, from its counts."""

    def __init__(self, model_name: str, dtype: str, kv: KVSetup, max_adapters: int) -> None:
        """max_adapters: in one step."""
        self._make = Families("vllm:", {"model_name": model_name, "engine": "0"})
        self._kept = {
            "cache_dtype": dtype,
            "kv_format": kv.format,
            "kv_select": str(kv.selection),
            "prefill": str(kv.prefill),
        }
        self._max_adapters = max_adapters

    def of(self, stats: EngineStats) -> Iterable[Metric]:
        yield from self._queue(stats)
        yield from self._counts(stats)
        make = self._make
        for name, distribution in stats.requests.items():
            yield make.histogram(name, TEXTS[name], distribution)
        text = "Tokens computed in a step."
        yield make.histogram("iteration_tokens_total", text, stats.steps.tokens)

    def _queue(self, stats: EngineStats) -> Iterable[Metric]:
        make, deferred = self._make, stats.waiting_for_adapter
        yield make.gauge("num_requests_running", "Requests running.", stats.num_running)
        yield make.gauge("num_requests_waiting", "Requests waiting.", stats.num_waiting)
        yield make.gauges(
            "num_requests_waiting_by_reason",
            "Requests waiting: for room (capacity), or for their adapter to be loaded (deferred).",
            ("reason",),
            by_one({"capacity": stats.num_waiting - deferred, "deferred": deferred}),
        )
        yield make.gauge(
            "kv_cache_usage_perc", "Share of the pool that KV in use holds, 0 to 1.", stats.kv_usage
        )
        facts = {
            "block_size": str(stats.block_size),
            "num_gpu_blocks": str(stats.pages_total),
            "enable_prefix_caching": str(stats.prefix_caching),
            **self._kept,
        }
        yield make.gauges(
            "cache_config_info", "How KV is kept.", tuple(facts), [(tuple(facts.values()), 1)]
        )
        # Routers read the label lists of the series with the newest value, a time.
        adapters = {
            "max_lora": str(self._max_adapters),
            "running_lora_adapters": ",".join(stats.running_adapters),
            "waiting_lora_adapters": ",".join(stats.waiting_adapters),
        }
        yield make.gauges(
            "lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            tuple(adapters),
            [(tuple(adapters.values()), time.time())],
        )

    def _counts(self, stats: EngineStats) -> Iterable[Metric]:
        counter = self._make.counter
        yield counter("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens)
        yield counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        text = "Prompt tokens found in the prefix cache."
        yield counter("prefix_cache_hits", text, stats.prefix_hits)
        yield counter("num_preemptions", "Requests stopped to make room.", stats.preemptions)
        yield self._make.counters(
            "request_success", "Requests that ended.", ("finished_reason",), by_one(stats.finished)
        )
