"""Who computes how many tokens in the next step. Imports no torch.

Prefill, chunked prefill and decode are the same thing: a sequence has tokens whose KV is not
computed yet, and a step computes some of them under a budget. Running sequences come first, those
that decode before those that prefill; then waiting ones enter, in the order of their arrival, but
for those whose adapter is still being loaded. Out of pages, the sequence that was admitted last is
preempted, and recomputed later from what the prefix cache still has of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from polydelta.adapters_store.catalog import AdapterRef
from polydelta.engine.kv_cache import BASE_NAMESPACE, KVCache
from polydelta.engine.pool import PagePool
from polydelta.engine.residency import Residency, ResidencyState
from polydelta.engine.sequence import SampledToken, Schedule, ScheduledSequence, Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    # Tokens in one step.
    max_batch_tokens: int
    # Sequences running at the same time.
    max_batch_size: int


@dataclass(frozen=True)
class Failure:
    """A sequence that can never run, and why."""

    sequence: Sequence
    reason: str


class Scheduler:
    """Owns the waiting and the running; pages and adapters are its managers'."""

    def __init__(
        self, limits: SchedulerLimits, pool: PagePool, kv: KVCache, residency: Residency[Any, Any]
    ) -> None:
        self._limits = limits
        self._pool = pool
        self._kv = kv
        self._residency = residency
        self.waiting: deque[Sequence] = deque()
        # In the order of admission: the last one is preempted first.
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._failures: list[Failure] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self._leave_queue(sequence)

    def take_failures(self) -> list[Failure]:
        """Sequences that left because they can never run."""
        failures, self._failures = self._failures, []
        return failures

    def schedule(self) -> Schedule:
        """The next step; empty when nothing can run now."""
        budget = self._limits.max_batch_tokens
        preemptions = self.num_preemptions
        shares: dict[Sequence, int] = {}
        for sequence in self._decodes_first():
            if budget == 0:
                break
            if sequence not in self.running:
                continue  # preempted by one before it
            count = min(sequence.num_uncomputed, budget)
            budget += self._make_room(sequence, count, shares)
            if sequence in self.running:
                self._kv.grow(sequence, sequence.num_computed + count)
                shares[sequence] = count
                budget -= count
        if self.num_preemptions == preemptions:
            self._admit_waiting(budget, shares)
        return [ScheduledSequence(sequence, count) for sequence, count in shares.items()]

    def commit(self, schedule: Schedule, sampled: Seq[SampledToken | None]) -> None:
        """Takes note that a step was computed; `sampled` has a token where one was due."""
        for scheduled, token in zip(schedule, sampled, strict=True):
            sequence = scheduled.sequence
            sequence.num_computed += scheduled.num_tokens
            self._kv.publish(sequence, self._namespace(sequence))
            if token is not None:
                sequence.token_ids.append(token.token_id)

    def bound_adapter(self, ref: AdapterRef) -> Any:
        """The resident adapter of a scheduled sequence."""
        return self._residency.bound(ref)

    def check_integrity(self) -> None:
        """Raises RuntimeError unless the pool's books balance."""
        self._pool.check_integrity([*self._kv.used_pages(), *self._residency.used_pages()])

    def _decodes_first(self) -> list[Sequence]:
        return sorted(self.running, key=lambda sequence: sequence.num_uncomputed > 1)

    def _make_room(self, sequence: Sequence, count: int, shares: dict[Sequence, int]) -> int:
        """Preempts until the sequence's next `count` tokens have room, itself if it must. Returns
        the budget that preempted sequences had been given in this step."""
        freed = 0
        needed = sequence.num_computed + count
        while not self._pool.can_allocate(self._kv.pages_missing(sequence, needed)):
            victim = self.running[-1]
            freed += shares.pop(victim, 0)
            self._preempt(victim)
            if victim is sequence:
                break
        return freed

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit_waiting(self, budget: int, shares: dict[Sequence, int]) -> None:
        skipped = 0
        for sequence in list(self.waiting):
            full = len(self.running) == self._limits.max_batch_size
            # No look further ahead than a full batch: what is prefetched takes host RAM.
            if budget == 0 or full or skipped == self._limits.max_batch_size:
                break
            if not self._adapter_ready(sequence) or not self._can_ever_run(sequence):
                skipped += sequence in self.waiting  # one that failed has left
                continue
            prefix = self._kv.find_prefix(sequence, self._namespace(sequence))
            if not self._can_admit(sequence, prefix):
                break
            self.waiting.remove(sequence)
            count = self._admit(sequence, prefix, budget)
            shares[sequence] = count
            budget -= count

    def _adapter_ready(self, sequence: Sequence) -> bool:
        """Whether the sequence's adapter can be had at once; else starts to load it."""
        if sequence.adapter is None:
            return True
        if sequence not in self.waiting:
            return False  # failed a moment ago, with another one of the same adapter
        self._residency.prefetch(sequence.adapter)
        match self._residency.state(sequence.adapter):
            case ResidencyState.FAILED:
                self._fail_all(sequence)
                return False
            case ResidencyState.LOADING_TO_HOST:
                return False
        return True

    def _fail_all(self, sequence: Sequence) -> None:
        """One failed load fails everybody who waited for it; later requests try again."""
        if sequence.adapter is None:
            return
        reason = self._residency.take_error(sequence.adapter)
        for other in [s for s in self.waiting if s.adapter == sequence.adapter]:
            self._fail(other, reason)

    def _can_admit(self, sequence: Sequence, prefix: list[int]) -> bool:
        """Whether its adapter and all its tokens so far fit beside what is in use."""
        pages = self._kv.pages_for(sequence.num_tokens) - len(prefix)
        pages += self._kv.idle_among(prefix)  # taken back into use, they are not evictable
        if sequence.adapter is not None:
            pages += self._residency.pages_to_acquire(sequence.adapter)
        return self._pool.can_allocate(pages)

    def _can_ever_run(self, sequence: Sequence) -> bool:
        """False, and the sequence has failed, when even an empty pool is too small for it."""
        adapter = sequence.adapter
        adapter_pages = 0 if adapter is None else self._residency.pages_needed(adapter)
        longest = sequence.num_prompt_tokens + sequence.request.sampling.max_tokens
        pages = self._kv.pages_for(longest) + adapter_pages
        if pages <= self._pool.num_pages:
            return True
        self._fail(
            sequence,
            f"The request needs {pages} pages of the pool ({adapter_pages} of them for its "
            f"adapter), but the pool has {self._pool.num_pages}: ask for fewer tokens, or start "
            "the server with a larger pool.",
        )
        return False

    def _fail(self, sequence: Sequence, reason: str) -> None:
        self._leave_queue(sequence)
        self._failures.append(Failure(sequence, reason))

    def _leave_queue(self, sequence: Sequence) -> None:
        """Out of the waiting; what was loaded for it goes if nobody else waits for it."""
        self.waiting.remove(sequence)
        if sequence.adapter and all(s.adapter != sequence.adapter for s in self.waiting):
            self._residency.drop_unused(sequence.adapter)

    def _admit(self, sequence: Sequence, prefix: list[int], budget: int) -> int:
        """Cannot fail after `_can_admit`. Returns the tokens that it computes in this step."""
        self._kv.admit(sequence, prefix)
        if sequence.adapter is not None:
            self._residency.acquire(sequence.adapter)
        self.running.append(sequence)
        count = min(sequence.num_uncomputed, budget)
        self._kv.grow(sequence, sequence.num_computed + count)
        return count

    def _release(self, sequence: Sequence) -> None:
        self._kv.release(sequence)
        if sequence.adapter is not None:
            self._residency.release(sequence.adapter)

    def _namespace(self, sequence: Sequence) -> str:
        if sequence.adapter is None:
            return BASE_NAMESPACE
        return self._residency.digest(sequence.adapter)
