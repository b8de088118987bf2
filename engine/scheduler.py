"""Who computes how many tokens in the next step. Imports no torch.

Prefill, chunked prefill and decode are the same thing: a sequence has tokens whose KV is not
computed yet, and a step computes some of them under a budget. Running sequences come first, those
that decode before those that prefill; then waiting ones enter, in the order of a policy, but for
those whose adapters are still being loaded. Out of pages, the sequence that was admitted last is
preempted; it has its KV back later from the prefix cache, from host RAM, or by recomputation.

A step may be scheduled while the one before it is under way: `advance` notes that a step was
launched, `commit` what it sampled. Whether a sequence has ended is known one step late then: a step
may compute some that have left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from polydelta.adapters_store.errors import AdapterError, StoreError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.adapter_entry import AdapterPlace
from polydelta.engine.admission import Admission
from polydelta.engine.entrance import Entrance
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.overload import Overload, QueueLimits
from polydelta.engine.policies import Policy
from polydelta.engine.pools import Pools
from polydelta.engine.preemption import Preemption
from polydelta.engine.prefetching import MAX_PREFETCHED, Prefetching
from polydelta.engine.request import ErrorKind, RequestError
from polydelta.engine.residency import Residency
from polydelta.engine.sequence import SampledToken, Schedule, ScheduledSequence, Sequence
from polydelta.engine.waiting import Flow, Key, Line, WaitingQueue


@dataclass(frozen=True)
class SchedulerLimits:
    # Tokens in one step.
    max_batch_tokens: int
    # Sequences running at the same time.
    max_batch_size: int
    # The model's context window, virtual tokens of adapters included.
    max_positions: int
    queue: QueueLimits = field(default_factory=QueueLimits)


@dataclass(frozen=True)
class Failure:
    """A sequence that will not run any more, and why."""

    sequence: Sequence
    error: RequestError


class Scheduler:
    """Owns the waiting and the running; pages and adapters are its managers'."""

    def __init__(
        self,
        limits: SchedulerLimits,
        policy: Policy,
        pools: Pools,
        kv: KVCache,
        residency: Residency[Any, Any],
        preemption: Preemption,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._policy = policy
        self._pools = pools
        self._kv = kv
        self._residency = residency
        self.preemption = preemption
        self._admission = Admission(pools, kv, residency, preemption, limits.max_positions)
        self._overload = Overload(limits.queue, policy)
        self._prefetching = Prefetching(residency)
        self._clock = clock
        self.waiting = WaitingQueue()
        # In the order of admission.
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
        """To those that wait, or to the failures where it would wait for too long."""
        refusal = self._overload.refusal(sequence, self.waiting, self._clock())
        if refusal is not None:
            sequence.has_left = True
            self._failures.append(Failure(sequence, refusal))
            return
        self.waiting.add(sequence)
        self._policy.queued(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        sequence.has_left = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._admission.release(sequence)
        elif sequence in self.waiting:
            self._give_up(sequence)
        else:  # it was refused, and whoever takes the failures need not hear of it any more
            self._failures = [one for one in self._failures if one.sequence is not sequence]

    def is_awaited(self, ref: AdapterRef) -> bool:
        """Whether a waiting sequence needs the adapter."""
        return self.waiting.needs(ref)

    def fail_waiting(self, ref: AdapterRef, error: AdapterError) -> None:
        """One failed load fails everybody who waited for it; later requests try again."""
        kind = ErrorKind.SERVER if isinstance(error, StoreError) else ErrorKind.REQUEST
        for sequence in [s for s in self.waiting if s.uses(ref)]:
            self._fail(sequence, RequestError(str(error), kind))

    def take_failures(self) -> list[Failure]:
        """Sequences that left because they can never run, or not in time."""
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
            tokens = self._admission.next_chunk(sequence, budget)
            if not tokens:
                continue
            budget += self._make_room(sequence, tokens, shares)
            if sequence in self.running:
                self._admission.grow(sequence, tokens)
                shares[sequence] = tokens
                budget -= tokens
        for sequence, error in self._overload.late(self.waiting, self._clock()):
            self._fail(sequence, error)
        # Before the admission: what host RAM has is there at once, and enters in this step.
        line = self._look_ahead()
        # Room that was made by preemption is for those who run. Where nobody runs any more, the
        # waiting are looked at now: nothing would wake the loop to do it later.
        if not shares or self.num_preemptions == preemptions:
            self._admit_waiting(line, budget, shares)
        for sequence, error in self._overload.excess(self.waiting, self._keys, self._clock()):
            self._fail(sequence, error)
        return [ScheduledSequence(sequence, tokens) for sequence, tokens in shares.items()]

    def advance(self, schedule: Schedule) -> None:
        """Takes note that a step was launched."""
        for scheduled in schedule:
            scheduled.sequence.num_computed += scheduled.num_tokens
            self._admission.launched(scheduled.sequence)
            if scheduled.num_tokens == 1 and scheduled.samples and not scheduled.is_prefill:
                self._policy.charge(scheduled.sequence, 0, 1)
            if scheduled.samples:
                scheduled.sequence.expect_token()

    def commit(self, schedule: Schedule, sampled: Seq[SampledToken | None]) -> None:
        """Takes note of what the oldest step under way has sampled, where a token was due."""
        for scheduled, token in zip(schedule, sampled, strict=True):
            sequence = scheduled.sequence
            if sequence.has_left:
                continue
            if token is not None:
                if scheduled.is_prefill:
                    self._overload.first_token(sequence, self._clock())
                sequence.learn_token(token.token_id)
            # One that was preempted meanwhile has no pages.
            if sequence.block_table:
                self._admission.publish(sequence)

    def seconds_to_deadline(self) -> float | None:
        """After which one of those that wait is late, though nothing happens; None for never."""
        return self._overload.seconds_to_deadline(self.waiting, self._clock())

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
        self._pools.check_integrity(self._kv.used_pages(), self._residency.used_pages())

    def _awaits_last(self, sequence: Sequence) -> bool:
        """Whether the token that is on its way will be the sequence's last."""
        if not sequence.num_unknown:
            return False
        full = sequence.num_prefix_tokens + sequence.num_tokens >= self._limits.max_positions
        return full or sequence.num_output_tokens >= sequence.request.sampling.max_tokens

    def _decodes_first(self) -> list[Sequence]:
        return sorted(self.running, key=lambda sequence: sequence.num_uncomputed > 1)

    def _make_room(self, sequence: Sequence, tokens: int, shares: dict[Sequence, int]) -> int:
        """Preempts until the sequence's next tokens have room, itself if it must. Returns the
        budget that preempted sequences had been given in this step."""
        freed = 0
        while not self._admission.can_grow(sequence, tokens):
            victim = self._policy.victim(self.running, self._entrance().share)
            freed += shares.pop(victim, 0)
            self._preempt(victim)
            if victim is sequence:
                break
        return freed

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._admission.preempt(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add_first(sequence)
        self._policy.queued(sequence)

    def _look_ahead(self) -> Line:
        """Starts loads for those who enter next; those whose load has failed leave."""
        line = self._next_in_line()
        # One at a time: who leaves lets go of the other parts of its sum, failed or not.
        while (unreadable := self._prefetching.unreadable(line.flows)) is not None:
            self.fail_waiting(unreadable, self._residency.take_error(unreadable))
            line = self._next_in_line()
        self._prefetching.start(line.flows)
        return line

    def _next_in_line(self) -> Line:
        return self.waiting.line(MAX_PREFETCHED + self._limits.max_batch_size, self._keys())

    def _keys(self) -> Callable[[Flow], Key]:
        return self._policy.keys(self.waiting.flows, self._is_resident)

    def _is_resident(self, flow: Flow) -> bool:
        return all(map(self._residency.is_resident, flow.refs))

    def _admit_waiting(self, line: Line, budget: int, shares: dict[Sequence, int]) -> None:
        entrance = self._entrance()
        for sequence in line.in_turn():
            if budget == 0 or entrance.is_closed:
                break
            # One that was preempted waits for what a step under way has sampled for it.
            if sequence.num_unknown or not self._admission.is_ready(sequence):
                continue
            if (problem := self._problem(sequence)) is not None:
                self._fail(sequence, RequestError(problem))
                continue
            victims = entrance.who_makes_way(sequence)
            if victims is None:
                continue
            for victim in victims:
                budget += shares.pop(victim, 0)
                self._preempt(victim)
            if tokens := self._admit(sequence, budget):
                shares[sequence] = tokens
                budget -= tokens

    def _problem(self, sequence: Sequence) -> str | None:
        """Why a sequence that is ready can never run; None where it can."""
        limits = self._limits
        return self._admission.problem(sequence) or self._kv.rules.problem(
            sequence, limits.max_batch_tokens, limits.max_batch_size
        )

    def _entrance(self) -> Entrance:
        return Entrance(self._policy, self._admission, self.running, self.max_batch_size)

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Cannot fail for whom the entrance is open. Returns the tokens of this step, which may be
        none."""
        self.waiting.remove(sequence)
        # Looked up again: with those that made way, a part may have gone.
        self._admission.admit(sequence, self._admission.find_prefix(sequence))
        self.running.append(sequence)
        if sequence.admitted_at is None:
            sequence.admitted_at = self._clock()
            self._overload.admitted(sequence.admitted_at, others_wait=bool(self.waiting))
            self._policy.charge(sequence, sequence.num_uncomputed, 0)
        self._policy.left_queue(sequence)
        tokens = self._admission.next_chunk(sequence, budget)
        self._admission.grow(sequence, tokens)
        return tokens

    def _fail(self, sequence: Sequence, error: RequestError) -> None:
        sequence.has_left = True
        self._give_up(sequence)
        self._failures.append(Failure(sequence, error))

    def _give_up(self, sequence: Sequence) -> None:
        """Out of the waiting; what was loaded for it goes if nobody else waits for it."""
        self.waiting.remove(sequence)
        self._admission.forget(sequence)
        self._policy.left_queue(sequence)
        for ref in sequence.adapter_refs:
            if not self.is_awaited(ref):
                self._residency.drop_unused(ref)
