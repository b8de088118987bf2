"""What only this server has: one pool, adapters that come and go, steps that mix them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric

from polydelta.server.metrics.families import Families, by_one

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.adapter_usage import AdapterCounts
    from polydelta.engine.stats import EngineStats

# Stands for all adapters that have no series of their own.
OTHER = "other"

# Field of the engine's counts -> name, text.
PER_ADAPTER = {
    "requests": ("requests", "Requests that came"),
    "hits": ("hits", "Requests that found the adapter in the pool"),
    "queue_seconds": ("queue_seconds", "Request to first step, in seconds"),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts, counted when a request has ended"),
    "generation_tokens": ("generation_tokens", "Tokens generated, counted likewise"),
    "swap_ins": ("swap_ins", "Copies into the pool"),
    "swap_in_seconds": ("swap_in_seconds", "What these took, in seconds"),
    "swap_outs": ("swap_outs", "How often the pool let go of it"),
}
# Of these, what a tenant has as well.
PER_TENANT = ("requests", "prompt_tokens", "generation_tokens", "queue_seconds")


class OwnMetrics:
    """Of one engine, from its counts."""

    def __init__(self, model_name: str, most_named: int) -> None:
        """most_named: adapters with series of their own, at most."""
        self._make = Families("polydelta_", {"model_name": model_name})
        self._base = model_name
        self._most_named = most_named

    def of(self, stats: EngineStats, pool_bytes: int, ready: bool) -> Iterable[Metric]:
        yield self._make.gauge("ready", "1 while new requests are taken.", ready)
        yield from self._pool(stats, pool_bytes)
        yield from self._loads(stats)
        yield from self._preemptions(stats)
        yield from self._adapters(stats)
        yield from self._tenants(stats)
        yield from self._steps(stats)

    def _pool(self, stats: EngineStats, pool_bytes: int) -> Iterable[Metric]:
        make = self._make
        owners = {
            "free": stats.pages_free,
            "kv": stats.pages_kv,
            "cached": stats.pages_cached,
            "adapters": stats.pages_adapters,
            "adapters_idle": stats.pages_adapters_idle,
        }
        text = "Pages of the unified pool by who holds them."
        yield make.gauges("pool_pages", text, ("owner",), by_one(owners))
        yield make.gauge("pool_size_pages", "Pages in the unified pool.", stats.pages_total)
        yield make.gauge("pool_bytes", "Bytes of the unified pool.", pool_bytes)
        text = "Tokens of KV that the unified pool holds where no adapter is in it."
        yield make.gauge("pool_kv_tokens", text, stats.kv_tokens)
        evictions = {
            (kind, str(reason)): count
            for kind, counts in (
                ("adapter", stats.adapter_evictions_by_reason),
                ("prefix", stats.prefix_evictions_by_reason),
            )
            for reason, count in counts.items()
        }
        text = "Idle adapters and prefix blocks put out of the pool."
        yield make.counters("evictions", text, ("kind", "reason"), evictions.items())

    def _loads(self, stats: EngineStats) -> Iterable[Metric]:
        make, copies = self._make, stats.usage.total()
        loads = {str(tier): totals.loads for tier, totals in stats.loads.items()}
        seconds = {str(tier): totals.seconds for tier, totals in stats.loads.items()}
        yield make.counters(
            "adapter_loads",
            "Loads that succeeded: of files as uploaded (read, checked, packed) and of packed"
            " forms, from disk into host RAM; and from host RAM into the pool.",
            ("tier",),
            by_one(loads | {"host": copies.swap_ins}),
        )
        text = "What these took, in seconds."
        host = {"host": copies.swap_in_seconds}
        yield make.counters("adapter_load_seconds", text, ("tier",), by_one(seconds | host))
        yield make.counter("adapter_load_failures", "Loads that failed.", stats.load_failures)
        text = "Requests that found an adapter of theirs outside the pool."
        yield make.counter("cold_starts", text, stats.cold_starts)
        text = "Waiting requests whose adapter is still being loaded."
        yield make.gauge("requests_waiting_for_adapter", text, stats.waiting_for_adapter)

    def _preemptions(self, stats: EngineStats) -> Iterable[Metric]:
        make = self._make
        modes = {str(mode): count for mode, count in stats.preemptions_by_mode.items()}
        text = "Requests stopped to make room, by how they get their KV back."
        yield make.counters("preemptions", text, ("mode",), by_one(modes))
        text = "KV in host RAM, of preempted requests and of what infllm seldom reads, in bytes."
        yield make.gauge("host_kv_bytes", text, stats.host_kv_bytes)

    def _adapters(self, stats: EngineStats) -> Iterable[Metric]:
        rows = self._counts(stats)
        for field, (name, text) in PER_ADAPTER.items():
            yield self._make.counters(
                f"adapter_{name}",
                f"{text}; by adapter, the bare base model among them.",
                ("adapter",),
                by_one({adapter: getattr(counts, field) for adapter, counts in rows.items()}),
            )
        # The busiest first, as far as they are in the pool.
        busy = sorted(stats.resident, key=lambda one: one.id not in rows)
        named = list(islice(busy, self._most_named))
        others = busy[len(named) :]
        labels = ("adapter", "version")
        held = {(one.id, str(one.version)): 1 for one in named}
        pages = {(one.id, str(one.version)): one.pages for one in named}
        if others:
            held[OTHER, ""] = len(others)
            pages[OTHER, ""] = sum(one.pages for one in others)
        yield self._make.gauges(
            "adapter_resident", "1 for an adapter in the pool.", labels, held.items()
        )
        yield self._make.gauges(
            "adapter_pages", "Pages that it holds there.", labels, pages.items()
        )

    def _tenants(self, stats: EngineStats) -> Iterable[Metric]:
        for field in PER_TENANT:
            name, text = PER_ADAPTER[field]
            yield self._make.counters(
                f"tenant_{name}",
                f"{text}; by tenant.",
                ("tenant",),
                by_one(
                    {tenant: getattr(one, field) for tenant, one in stats.tenants.named.items()}
                ),
            )

    def _counts(self, stats: EngineStats) -> Mapping[str, AdapterCounts]:
        """By the label that stands for each."""
        rows = {OTHER: replace(stats.usage.others)}
        for name, counts in stats.usage.named.items():
            label = name or self._base
            # There is one already for an adapter that is called as the base, or as the others.
            if label in rows:
                rows[label].add(counts)
            else:
                rows[label] = replace(counts)
        return rows

    def _steps(self, stats: EngineStats) -> Iterable[Metric]:
        make, steps = self._make, stats.steps
        yield make.histograms(
            "step_seconds",
            "Seconds of the engine's thread in each phase of a step.",
            ("phase",),
            {(str(phase),): seconds for phase, seconds in steps.phases.items()},
        )
        yield make.histogram("step_sequences", "Sequences in a step.", steps.sequences)
        yield make.histogram("step_adapters", "Different adapters in a step.", steps.adapters)
        text = "Tokens computed, recomputed ones again."
        yield make.counters("step_tokens", text, ("phase",), by_one(steps.computed))
