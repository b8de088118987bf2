"""Who computes how many tokens in the next step. Imports no torch.

Prefill, chunked prefill and decode are the same thing: a sequence has tokens whose KV is not
computed yet, and a step computes some of them under a budget. Running sequences come first, those
that decode before those that prefill; then waiting ones enter, in the order of their arrival, but
for those whose adapters are still being loaded. Out of pages, the sequence that was admitted last
is preempted, and recomputed later from what the prefix cache still has of it.

A step may be scheduled while the one before it is under way: `advance` notes that a step was
launched, `commit` what it sampled. Whether a sequence has ended is known one step late then: a step
may compute some that have left.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice
from typing import Any

from polydelta.adapters_store.composition import sum_digest
from polydelta.adapters_store.errors import AdapterError, StoreError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.kv_cache import BASE_NAMESPACE, KVCache
from polydelta.engine.pool import PagePool
from polydelta.engine.request import ErrorKind, RequestError
from polydelta.engine.residency import AdapterPlace, Residency, ResidencyState
from polydelta.engine.sequence import SampledToken, Schedule, ScheduledSequence, Sequence

# Adapters that are loaded ahead for the waiting at a time: each takes host RAM until its turn.
MAX_PREFETCHED = 8


@dataclass(frozen=True)
class SchedulerLimits:
    # Tokens in one step.
    max_batch_tokens: int
    # Sequences running at the same time.
    max_batch_size: int
    # The model's context window, virtual tokens of adapters included.
    max_positions: int


@dataclass(frozen=True)
class Failure:
    """A sequence that can never run, and why."""

    sequence: Sequence
    error: RequestError


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

    @property
    def max_positions(self) -> int:
        """The model's context window, virtual tokens of adapters included."""
        return self._limits.max_positions

    @property
    def max_batch_size(self) -> int:
        """Sequences that run at the same time, at most."""
        return self._limits.max_batch_size

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        sequence.has_left = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self._leave_queue(sequence)

    def is_awaited(self, ref: AdapterRef) -> bool:
        """Whether a waiting sequence needs the adapter."""
        return any(sequence.uses(ref) for sequence in self.waiting)

    def fail_waiting(self, ref: AdapterRef, error: AdapterError) -> None:
        """One failed load fails everybody who waited for it; later requests try again."""
        for sequence in [s for s in self.waiting if s.uses(ref)]:
            kind = ErrorKind.SERVER if isinstance(error, StoreError) else ErrorKind.REQUEST
            self._fail(sequence, RequestError(str(error), kind))

    def take_failures(self) -> list[Failure]:
        """Sequences that left because they can never run."""
        failures, self._failures = self._failures, []
        return failures

    def schedule(self) -> Schedule:
        """The next step; empty when nothing can run now. Where it has failures, whoever stood
        behind them may be able to: ask again before you rest."""
        budget = self._limits.max_batch_tokens
        preemptions = self.num_preemptions
        shares: dict[Sequence, int] = {}
        for sequence in self._decodes_first():
            if budget == 0:
                break
            if sequence not in self.running or self._awaits_last(sequence):
                continue  # preempted by one before it, or done with the step under way
            count = min(sequence.num_uncomputed, budget)
            budget += self._make_room(sequence, count, shares)
            if sequence in self.running:
                self._kv.grow(sequence, sequence.num_computed + count)
                shares[sequence] = count
                budget -= count
        # Before the admission: what host RAM has is there at once, and enters in this step.
        self._look_ahead()
        # Room that was made by preemption is for those who run. Where nobody runs any more, the
        # waiting are looked at now: nothing would wake the loop to do it later.
        if not shares or self.num_preemptions == preemptions:
            self._admit_waiting(budget, shares)
        return [ScheduledSequence(sequence, count) for sequence, count in shares.items()]

    def advance(self, schedule: Schedule) -> None:
        """Takes note that a step was launched."""
        for scheduled in schedule:
            scheduled.sequence.num_computed += scheduled.num_tokens
            if scheduled.samples:
                scheduled.sequence.expect_token()

    def commit(self, schedule: Schedule, sampled: Seq[SampledToken | None]) -> None:
        """Takes note of what the oldest step under way has sampled, where a token was due."""
        for scheduled, token in zip(schedule, sampled, strict=True):
            sequence = scheduled.sequence
            if sequence.has_left:
                continue
            if token is not None:
                sequence.learn_token(token.token_id)
            # One that was preempted meanwhile has no pages.
            if sequence.block_table:
                self._kv.publish(sequence, self._namespace(sequence))

    def must_know_tokens(self) -> bool:
        """Whether the next step can only be computed when all tokens are known: penalties count
        them."""
        return any(s.num_unknown and s.request.sampling.penalised for s in self.running)

    def is_full(self, sequence: Sequence) -> bool:
        """Whether the context window has no place for one more token than those that are known."""
        return sequence.num_prefix_tokens + sequence.num_known >= self._limits.max_positions

    def bound_adapter(self, ref: AdapterRef) -> Any:
        """The resident adapter of a scheduled sequence."""
        return self._residency.bound(ref)

    def adapter_place(self, ref: AdapterRef) -> AdapterPlace:
        """Where an adapter is at the moment; any thread may ask."""
        return self._residency.describe(ref)

    def check_integrity(self) -> None:
        """Raises RuntimeError unless the pool's books balance."""
        self._pool.check_integrity([*self._kv.used_pages(), *self._residency.used_pages()])

    def _awaits_last(self, sequence: Sequence) -> bool:
        """Whether the token that is on its way will be the sequence's last."""
        if not sequence.num_unknown:
            return False
        full = sequence.num_prefix_tokens + sequence.num_tokens >= self._limits.max_positions
        return full or sequence.num_output_tokens >= sequence.request.sampling.max_tokens

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

    def _look_ahead(self) -> None:
        """Starts loads for those who wait, first come first; those whose load has failed leave."""
        # One at a time: who leaves lets go of the other parts of its sum, failed or not.
        while (unreadable := self._first_unreadable()) is not None:
            self.fail_waiting(unreadable, self._residency.take_error(unreadable))
        for ref in self._awaited():
            # Whoever is first gets all that it needs: sums of which each has a part would wait for
            # each other for ever.
            first = self.waiting[0].uses(ref)
            if first or self._residency.num_on_their_way() < MAX_PREFETCHED:
                self._residency.prefetch(ref)

    def _first_unreadable(self) -> AdapterRef | None:
        failed = ResidencyState.FAILED
        return next((ref for ref in self._awaited() if self._residency.state(ref) is failed), None)

    def _awaited(self) -> list[AdapterRef]:
        """Adapters of the first in the queue, in its order; each once."""
        first = islice(self.waiting, self._limits.max_batch_size)
        return list(dict.fromkeys(ref for sequence in first for ref in sequence.adapter_refs))

    def _admit_waiting(self, budget: int, shares: dict[Sequence, int]) -> None:
        skipped = 0
        for sequence in list(self.waiting):
            full = len(self.running) == self._limits.max_batch_size
            if budget == 0 or full or skipped == self._limits.max_batch_size:
                break
            # One that was preempted waits for what a step under way has sampled for it.
            ready = not sequence.num_unknown and self._adapters_ready(sequence)
            if not ready or not self._can_ever_run(sequence):
                skipped += sequence in self.waiting  # one that failed has left
                continue
            prefix = self._kv.find_prefix(sequence, self._namespace(sequence))
            if not self._can_admit(sequence, prefix):
                break
            self.waiting.remove(sequence)
            count = self._admit(sequence, prefix, budget)
            shares[sequence] = count
            budget -= count

    def _adapters_ready(self, sequence: Sequence) -> bool:
        """Whether all of the sequence's adapters can be had at once; it knows what they do then."""
        ready = (ResidencyState.ON_HOST, ResidencyState.RESIDENT)
        if any(self._residency.state(ref) not in ready for ref in sequence.adapter_refs):
            return False
        sequence.learn(map(self._residency.traits, sequence.adapter_refs))
        return True

    def _can_admit(self, sequence: Sequence, prefix: list[int]) -> bool:
        """Whether its adapters and all its tokens so far fit beside what is in use."""
        pages = self._kv.pages_for(sequence, sequence.num_tokens) - len(prefix)
        pages += self._kv.idle_among(prefix)  # taken back into use, they are not evictable
        pages += sum(map(self._residency.pages_to_acquire, sequence.adapter_refs))
        return self._pool.can_allocate(pages)

    def _can_ever_run(self, sequence: Sequence) -> bool:
        """False, and the sequence has failed, when even an empty pool is too small for it, or the
        context window."""
        problem = self._lack_of_pages(sequence) or self._lack_of_positions(sequence)
        if problem is not None:
            self._fail(sequence, RequestError(problem))
        return problem is None

    def _lack_of_pages(self, sequence: Sequence) -> str | None:
        refs, prompt = sequence.adapter_refs, sequence.num_prompt_tokens
        adapter_pages = sum(map(self._residency.pages_needed, refs))
        window = self._limits.max_positions - sequence.num_prefix_tokens
        longest = max(prompt + 1, min(prompt + sequence.request.sampling.max_tokens, window))
        pages = self._kv.pages_for(sequence, longest) + adapter_pages
        pinned = self._residency.num_pinned_pages(besides=refs)
        if pages + pinned <= self._pool.num_pages:
            return None
        others = f", {pinned} of which pinned adapters hold" if pinned else ""
        return (
            f"The request needs {pages} pages of the pool ({adapter_pages} of them for its "
            f"adapters), but the pool has {self._pool.num_pages}{others}: ask for fewer tokens, "
            "or start the server with a larger pool."
        )

    def _lack_of_positions(self, sequence: Sequence) -> str | None:
        virtual, prompt = sequence.num_prefix_tokens, sequence.num_prompt_tokens
        limit = self._limits.max_positions
        if virtual + prompt < limit:
            return None
        return (
            f"The adapter puts {virtual} virtual tokens before the prompt's {prompt}, but the "
            f"context window is {limit} tokens and an answer needs at least one of them: shorten "
            "the prompt, or use an adapter with fewer virtual tokens."
        )

    def _fail(self, sequence: Sequence, error: RequestError) -> None:
        sequence.has_left = True
        self._leave_queue(sequence)
        self._failures.append(Failure(sequence, error))

    def _leave_queue(self, sequence: Sequence) -> None:
        """Out of the waiting; what was loaded for it goes if nobody else waits for it."""
        self.waiting.remove(sequence)
        for ref in sequence.adapter_refs:
            if not self.is_awaited(ref):
                self._residency.drop_unused(ref)

    def _admit(self, sequence: Sequence, prefix: list[int], budget: int) -> int:
        """Cannot fail after `_can_admit`. Returns the tokens that it computes in this step."""
        self._kv.admit(sequence, prefix)
        # Idle ones first: room for the others must not be made of them.
        refs = sorted(sequence.adapter_refs, key=lambda ref: not self._residency.is_resident(ref))
        for ref in refs:
            self._residency.acquire(ref)
        self._lend_prefix(sequence)
        self.running.append(sequence)
        if sequence.admitted_at is None:
            sequence.admitted_at = time.monotonic()
        count = min(sequence.num_uncomputed, budget)
        self._kv.grow(sequence, sequence.num_computed + count)
        return count

    def _lend_prefix(self, sequence: Sequence) -> None:
        """Shows a sequence the ready-made KV before it, in the pages of its adapter."""
        refs, full = sequence.adapter_refs, sequence.num_prefix_tokens // self._kv.block_size
        pages = [page for ref in refs for page in self._residency.prefix_pages(ref)]
        sequence.prefix_pages = pages[:full]
        sequence.prefix_rest = pages[full] if full < len(pages) else None

    def _release(self, sequence: Sequence) -> None:
        self._kv.release(sequence)
        sequence.prefix_pages, sequence.prefix_rest = [], None
        for ref in sequence.adapter_refs:
            self._residency.release(ref)

    def _namespace(self, sequence: Sequence) -> str:
        if not sequence.adapters:
            return BASE_NAMESPACE
        return sum_digest(
            [(self._residency.digest(share.ref), share.weight) for share in sequence.adapters]
        )
