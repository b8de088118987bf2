"""What the engine tells of itself: counters that grow, and a picture of now. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polydelta.adapters_store.load_times import LoadTier, LoadTotals
from polydelta.engine.adapter_entry import ResidentAdapter
from polydelta.engine.adapter_usage import AdapterUsageSnapshot
from polydelta.engine.eviction import EvictionReason
from polydelta.engine.histogram import Distribution
from polydelta.engine.preemption_mode import PreemptionMode
from polydelta.engine.step_stats import StepSnapshot


@dataclass(frozen=True)
class EngineStats:
    """A snapshot, consistent in itself."""

    num_running: int = 0
    num_waiting: int = 0
    # Of those that wait: how many wait for their adapter to be loaded.
    waiting_for_adapter: int = 0
    # Pages of the pool: all, and by owner.
    pages_total: int = 0
    pages_free: int = 0
    # In the block table of a running sequence.
    pages_kv: int = 0
    # Prefix blocks that nobody uses at the moment.
    pages_cached: int = 0
    # Adapters of running sequences, and pinned ones.
    pages_adapters: int = 0
    # Resident adapters that nobody uses at the moment.
    pages_adapters_idle: int = 0
    # Tokens of KV in a page, and in all pages that KV may have.
    block_size: int = 0
    kv_tokens: int = 0
    prefix_caching: bool = True
    # Counters since the start, in tokens, requests or events. A prompt counts, whole, when its
    # first token comes.
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    preemptions_by_mode: Mapping[PreemptionMode, int] = field(default_factory=dict)
    # Of preempted requests, in host RAM now.
    host_kv_bytes: int = 0
    # Requests that found one of their adapters outside the pool.
    cold_starts: int = 0
    # Loads into host RAM that succeeded, by where they began, and those that failed.
    loads: Mapping[LoadTier, LoadTotals] = field(default_factory=dict)
    load_failures: int = 0
    adapter_evictions_by_reason: Mapping[EvictionReason, int] = field(default_factory=dict)
    # Of prefix blocks.
    prefix_evictions_by_reason: Mapping[EvictionReason, int] = field(default_factory=dict)
    # Finish reason -> requests.
    finished: Mapping[str, int] = field(default_factory=dict)
    usage: AdapterUsageSnapshot = field(default_factory=AdapterUsageSnapshot)
    # By tenant, all of them by name; of what concerns adapters alone, nothing.
    tenants: AdapterUsageSnapshot = field(default_factory=AdapterUsageSnapshot)
    resident: tuple[ResidentAdapter, ...] = ()
    # Ids, sorted.
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    # By vLLM's name.
    requests: Mapping[str, Distribution] = field(default_factory=dict)
    steps: StepSnapshot = field(default_factory=StepSnapshot)

    @property
    def kv_usage(self) -> float:
        """Share of the pool that running sequences' KV takes."""
        return self.pages_kv / self.pages_total if self.pages_total else 0.0

    @property
    def resident_adapters(self) -> tuple[str, ...]:
        """Ids."""
        return tuple(adapter.id for adapter in self.resident)

    @property
    def adapter_loads(self) -> int:
        """Copies into the pool."""
        return self.usage.total().swap_ins

    @property
    def adapter_evictions(self) -> int:
        return sum(self.adapter_evictions_by_reason.values())
