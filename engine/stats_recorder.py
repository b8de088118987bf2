"""Counts what the engine does, on its thread. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence as Seq
from typing import Any

from polydelta.adapters_store.load_times import LoadTimes
from polydelta.engine.adapter_entry import ResidencyState
from polydelta.engine.adapter_usage import AdapterCounts, AdapterUsage
from polydelta.engine.eviction import CostModel
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.pools import Pools
from polydelta.engine.request import ErrorKind, FinishReason, RequestError
from polydelta.engine.request_stats import RequestStats
from polydelta.engine.residency import Residency
from polydelta.engine.scheduler import Scheduler
from polydelta.engine.sequence import SampledToken, Schedule, Sequence
from polydelta.engine.stats import EngineStats
from polydelta.engine.step_stats import StepPhase, StepStats

SERVED = (FinishReason.STOP, FinishReason.LENGTH)
# Those that were not let in have not failed.
REFUSALS = (ErrorKind.LATE, ErrorKind.QUEUE_FULL)
LOADING = (ResidencyState.ON_DISK, ResidencyState.LOADING_TO_HOST)


class StatsRecorder:
    """Takes note of what happens, before clients learn of it."""

    def __init__(
        self,
        pools: Pools,
        kv: KVCache,
        residency: Residency[Any, Any],
        costs: CostModel,
        load_times: LoadTimes,
    ) -> None:
        self._pools = pools
        self._kv = kv
        self._residency = residency
        self._costs = costs
        self._load_times = load_times
        self._requests = RequestStats()
        self._steps = StepStats()
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._cold_starts = 0
        # All have names: an operator wrote them down.
        self._tenants = AdapterUsage(most_named=sys.maxsize)
        self._finished: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})

    def arrived(self, sequence: Sequence) -> None:
        """Before it is scheduled."""
        is_cold = not all(map(self._residency.is_resident, sequence.adapter_refs))
        self._cold_starts += is_cold
        for name in _names(sequence):
            counts = self._residency.usage.use(name)
            counts.requests += 1
            counts.hits += not is_cold
        if tenant := sequence.request.tenant:
            counts = self._tenants.use(tenant)
            counts.requests += 1
            counts.hits += not is_cold

    def step(self, schedule: Schedule, tokens: Seq[SampledToken | None], seconds: float) -> None:
        """A step was computed and committed.

        tokens: one for each item, None where none was due, or nobody wants it any more; seconds: on
        the engine's thread since it was scheduled, or since the step before it was done.
        """
        now = time.monotonic()
        self._steps.composed(schedule)
        for item, token in zip(schedule, tokens, strict=True):
            if token is not None:
                self._token(item.sequence, now)
        computed = sum(item.num_tokens for item in schedule)
        if computed > 2 * len(schedule):  # mostly prefill
            self._costs.observe_prefill(computed, seconds)

    def phase(self, phase: StepPhase, seconds: float) -> None:
        self._steps.phase(phase, seconds)

    def finished(
        self, sequence: Sequence, reason: FinishReason, error: RequestError | None = None
    ) -> None:
        if error is None or error.kind not in REFUSALS:
            self._finished[reason.value] += 1
        times = sequence.times
        if reason in SERVED:
            self._requests.served(times, sequence.request.sampling.max_tokens)
        for counts in self._counts(sequence):
            counts.generation_tokens += times.num_output_tokens
            if times.first_token is not None:
                counts.prompt_tokens += times.num_prompt_tokens
            if times.admitted is not None:
                counts.queue_seconds += times.admitted - times.arrived

    def snapshot(self, scheduler: Scheduler) -> EngineStats:
        preemption = scheduler.preemption
        residency, pools = self._residency, self._pools
        idle = residency.num_idle_pages()
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            waiting_for_adapter=sum(map(self._waits_for_adapter, scheduler.waiting)),
            pages_total=pools.num_pages,
            pages_free=pools.num_free,
            pages_kv=self._kv.num_used_pages,
            pages_cached=pools.num_idle - idle,
            pages_adapters=len(residency.used_pages()),
            pages_adapters_idle=idle,
            block_size=self._kv.block_size,
            kv_tokens=pools.kv.num_pages * self._kv.block_size,
            prefix_caching=self._kv.prefix_caching,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._kv.stats.queries,
            prefix_hits=self._kv.stats.hits,
            preemptions=scheduler.num_preemptions,
            preemptions_by_mode=dict(preemption.counts),
            host_kv_bytes=preemption.num_bytes,
            cold_starts=self._cold_starts,
            loads=self._load_times.totals(),
            load_failures=residency.num_load_failures,
            adapter_evictions_by_reason=dict(residency.evictions),
            prefix_evictions_by_reason=dict(self._kv.stats.evictions),
            finished=dict(self._finished),
            usage=residency.usage.snapshot(),
            tenants=self._tenants.snapshot(),
            resident=tuple(residency.resident()),
            running_adapters=_adapter_ids(scheduler.running),
            waiting_adapters=_adapter_ids(scheduler.waiting),
            requests=self._requests.distributions(),
            steps=self._steps.snapshot(),
        )

    def _token(self, sequence: Sequence, now: float) -> None:
        self._generation_tokens += 1
        if sequence.last_token_at is None:
            sequence.first_token_at = sequence.last_token_at = now
            self._prompt_tokens += sequence.num_prompt_tokens
            self._requests.first_token(sequence.times)
        else:
            self._requests.token(now - sequence.last_token_at)
            sequence.last_token_at = now

    def _counts(self, sequence: Sequence) -> list[AdapterCounts]:
        """Where to count what a sequence came to."""
        counts = [self._residency.usage.counts(name) for name in _names(sequence)]
        if tenant := sequence.request.tenant:
            counts.append(self._tenants.counts(tenant))
        return counts

    def _waits_for_adapter(self, sequence: Sequence) -> bool:
        return any(self._residency.state(ref) in LOADING for ref in sequence.adapter_refs)


def _names(sequence: Sequence) -> set[str]:
    """By which its use is counted: a sum's are its parts, the bare base model's is ""."""
    return {ref.id for ref in sequence.adapter_refs} or {""}


def _adapter_ids(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({ref.id for s in sequences for ref in s.adapter_refs}))
