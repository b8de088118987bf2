"""What the engine tells of itself: counters that grow, and a picture of the last step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from polydelta.engine.eviction import CostModel
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.pool import PagePool
from polydelta.engine.request import FinishReason
from polydelta.engine.residency import Residency, ResidencyState
from polydelta.engine.scheduler import Scheduler
from polydelta.engine.sequence import SampledToken, Schedule, Sequence


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
    # Adapters of running sequences.
    pages_adapters: int = 0
    # Resident adapters that nobody uses at the moment.
    pages_adapters_idle: int = 0
    # Counters since the start, in tokens, requests or events.
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    # Finish reason -> requests.
    finished: Mapping[str, int] = field(default_factory=dict)
    resident_adapters: tuple[str, ...] = ()
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()

    @property
    def kv_usage(self) -> float:
        """Share of the pool that running sequences' KV takes."""
        return self.pages_kv / self.pages_total if self.pages_total else 0.0


class StatsRecorder:
    """Counts on the engine's thread; `snapshot` may be read from any."""

    def __init__(
        self, pool: PagePool, kv: KVCache, residency: Residency[Any, Any], costs: CostModel
    ) -> None:
        self._pool = pool
        self._kv = kv
        self._residency = residency
        self._costs = costs
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished: Counter[str] = Counter()
        self.snapshot = EngineStats(pages_total=pool.num_pages, pages_free=pool.num_free)

    def finished(self, reason: FinishReason) -> None:
        self._finished[reason.value] += 1

    def step(self, schedule: Schedule, tokens: Seq[SampledToken | None], seconds: float) -> None:
        """Takes note of a step that was computed and committed."""
        computed = sum(item.num_tokens for item in schedule)
        self._generation_tokens += sum(token is not None for token in tokens)
        self._prompt_tokens += sum(item.num_tokens for item in schedule if item.is_prefill)
        if computed > 2 * len(schedule):  # mostly prefill
            self._costs.observe_prefill(computed, seconds)

    def refresh(self, scheduler: Scheduler) -> None:
        """Takes a new snapshot."""
        residency, pool = self._residency, self._pool
        idle = residency.num_idle_pages()
        self.snapshot = EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            waiting_for_adapter=sum(map(self._waits_for_adapter, scheduler.waiting)),
            pages_total=pool.num_pages,
            pages_free=pool.num_free,
            pages_kv=self._kv.num_used_pages,
            pages_cached=pool.num_idle - idle,
            pages_adapters=len(residency.used_pages()),
            pages_adapters_idle=idle,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._kv.stats.queries,
            prefix_hits=self._kv.stats.hits,
            preemptions=scheduler.num_preemptions,
            adapter_loads=residency.num_loads,
            adapter_evictions=residency.num_evictions,
            finished=dict(self._finished),
            resident_adapters=tuple(ref.id for ref in residency.resident()),
            running_adapters=_adapter_ids(scheduler.running),
            waiting_adapters=_adapter_ids(scheduler.waiting),
        )

    def _waits_for_adapter(self, sequence: Sequence) -> bool:
        loading = (ResidencyState.ON_DISK, ResidencyState.LOADING_TO_HOST)
        return any(self._residency.state(ref) in loading for ref in sequence.adapter_refs)


def _adapter_ids(sequences: Seq[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({ref.id for s in sequences for ref in s.adapter_refs}))
