"""What the engine's tests share: a scheduler with all its managers, over make-believe memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from polydelta.adapters_store.composition import Share, combine
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.adapter_control import AdapterControl
from polydelta.engine.eviction import CostModel
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.tokenizer import Tokenizer
from polydelta.engine.pool import PagePool
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.residency import HostAdapter, Residency
from polydelta.engine.scheduler import Scheduler, SchedulerLimits
from polydelta.engine.sequence import SampledToken, Schedule, ScheduledSequence, Sequence
from polydelta.engine.stats import StatsRecorder

PAGE_BYTES = 100
VOCABULARY = 50


@dataclass(frozen=True)
class FakeAdapter:
    """A packed adapter without bytes."""

    digest: str
    bytes_per_layer: int

    @property
    def nbytes(self) -> int:
        return 3 * self.bytes_per_layer


@dataclass(frozen=True)
class FakeBound:
    """An adapter in the pool: where it should lie, and what should be there."""

    digest: str
    pages: tuple[int, ...]


@dataclass
class FakeHost:
    """A host tier whose loads end when the test says so."""

    # Adapter id -> size in pages, and digest where it is not the id itself.
    sizes: Mapping[str, int]
    digests: Mapping[str, str] = field(default_factory=dict)
    # Every load that was asked for, and those that have not ended.
    asked: list[str] = field(default_factory=list)
    pending: list[tuple[AdapterRef, Future[HostAdapter]]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def load(self, ref: AdapterRef) -> Future[HostAdapter]:
        future: Future[HostAdapter] = Future()
        self.asked.append(ref.id)
        self.pending.append((ref, future))
        return future

    def forget(self, ref: AdapterRef) -> None:
        self.forgotten.append(ref.id)

    def holds(self, ref: AdapterRef) -> bool:
        return False

    def finish(self, adapter_id: str | None = None) -> None:
        """Ends the pending loads of one adapter, or all."""
        for ref, future in self._take(adapter_id):
            digest = self.digests.get(ref.id, f"digest of {ref.id}")
            future.set_result(FakeAdapter(digest, self.sizes[ref.id] * PAGE_BYTES - 1))

    def fail(self, adapter_id: str | None, error: str) -> None:
        for _, future in self._take(adapter_id):
            future.set_exception(InvalidAdapterError(error))

    def _take(self, adapter_id: str | None) -> list[tuple[AdapterRef, Future[HostAdapter]]]:
        taken = [load for load in self.pending if adapter_id in (None, load[0].id)]
        self.pending = [load for load in self.pending if load not in taken]
        return taken


def make_ref(adapter_id: str) -> AdapterRef:
    return AdapterRef(adapter_id, 1, Path("unused"))


class World:
    """A scheduler and its managers. Memory holds names in place of numbers: of a token's KV, the
    digest and the tokens that it follows from; of an adapter's page, its digest. Every step checks
    that what it reads is what it should be."""

    def __init__(
        self,
        num_pages: int = 16,
        block_size: int = 4,
        max_batch_tokens: int = 64,
        max_batch_size: int = 8,
        prefix_caching: bool = True,
        adapters: Mapping[str, int] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.block_size = block_size
        self.limits = SchedulerLimits(max_batch_tokens, max_batch_size)
        self.pool = PagePool(num_pages)
        self.host = FakeHost(adapters or {}, digests or {})
        costs = CostModel()
        self.kv = KVCache(self.pool, block_size, costs, prefix_caching)
        self.num_wakes = 0
        self.residency = Residency(self.pool, PAGE_BYTES, self.host, self._bind, costs, self._wake)
        self.scheduler = Scheduler(self.limits, self.pool, self.kv, self.residency)
        self.control = AdapterControl(self.pool, self.kv, self.residency, self.scheduler)
        self.recorder = StatsRecorder(self.pool, self.kv, self.residency, costs)
        self.orders: list[Future[None]] = []
        self.submitted: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.failed: dict[Sequence, str] = {}
        # page -> what each of its places holds
        self.memory: dict[int, list[object]] = {
            page: [None] * block_size for page in range(num_pages)
        }

    @property
    def live(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def submit(
        self, prompt: Iterable[int], adapter: str | None = None, max_tokens: int = 1
    ) -> Sequence:
        """adapter: an id, or several with a + between them."""
        names = adapter.split("+") if adapter else []
        request = GenerationRequest(
            str(len(self.submitted)),
            tuple(prompt),
            SamplingParams(max_tokens),
            combine(Share(make_ref(name)) for name in names),
        )
        sequence = Sequence(request, lambda output: None)
        self.submitted.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def load(self, adapter: str, pin: bool = False) -> Future[None]:
        """Orders an adapter into the pool, as an operator does."""
        done: Future[None] = Future()
        self.control.load(make_ref(adapter), pin, done)
        self.orders.append(done)
        return done

    def unpin(self, adapter: str) -> None:
        self.control.unpin(make_ref(adapter), Future())

    def withdraw(self, order: Future[None]) -> None:
        self.control.withdraw(order)

    def evict(self, adapter: str) -> None:
        self.control.evict(make_ref(adapter))

    def forget(self, adapter: str) -> None:
        self.control.forget(make_ref(adapter))

    def step(self) -> Schedule:
        """One turn of the engine's loop."""
        self.control.advance()
        schedule = self.scheduler.schedule()
        failures = self.scheduler.take_failures()
        self.failed |= {f.sequence: f.reason for f in failures}
        self._check_schedule(schedule, rests=not schedule and not failures)
        self._compute(schedule)
        tokens = [SampledToken(next_token(s.sequence)) if s.samples else None for s in schedule]
        self.scheduler.commit(schedule, tokens)
        for scheduled in schedule:
            sequence = scheduled.sequence
            if sequence.num_output_tokens == sequence.request.sampling.max_tokens:
                self.scheduler.remove(sequence)
                self.finished.append(sequence)
        self.recorder.step(schedule, tokens, 0.01)
        self.check()
        return schedule

    def drain(self) -> None:
        """Ends every load and steps until nobody is left; fails when that takes too long."""
        for _ in range(50 + 20 * sum(map(most_steps, self.live))):
            if not self.live and all(order.done() for order in self.orders):
                return
            self.step()
            self.host.finish()
        raise AssertionError(f"{len(self.live)} sequences never finished")

    def check(self) -> None:
        """What holds between any two steps."""
        self.scheduler.check_integrity()
        self.recorder.refresh(self.scheduler)
        now = self.recorder.snapshot
        assert now.pages_total == (
            now.pages_free
            + now.pages_kv
            + now.pages_cached
            + now.pages_adapters
            + now.pages_adapters_idle
        )
        assert len(self.scheduler.running) <= self.limits.max_batch_size
        owners: dict[int, list[tuple[Sequence, int]]] = {}
        for sequence in self.scheduler.running:
            assert len(sequence.block_table) * self.block_size >= sequence.num_computed
            for index, page in enumerate(sequence.block_table):
                owners.setdefault(page, []).append((sequence, index))
        for users in owners.values():
            published = all(index < sequence.num_published for sequence, index in users)
            assert len(users) == 1 or published, "a page that was not published has two users"
        for sequence in self.scheduler.waiting:
            assert not sequence.block_table

    def namespace(self, sequence: Sequence) -> str:
        return "+".join(sorted(map(self.residency.digest, sequence.adapter_refs)))

    def _wake(self) -> None:
        self.num_wakes += 1

    def _bind(self, packed: HostAdapter, pages: Seq[int]) -> FakeBound:
        for page in pages:
            self.memory[page] = [packed.digest] * self.block_size
        return FakeBound(packed.digest, tuple(pages))

    def _check_schedule(self, schedule: Schedule, rests: bool) -> None:
        assert sum(s.num_tokens for s in schedule) <= self.limits.max_batch_tokens
        assert len(schedule) <= self.limits.max_batch_size
        assert len({s.sequence for s in schedule}) == len(schedule)
        for scheduled in schedule:
            sequence = scheduled.sequence
            assert 1 <= scheduled.num_tokens <= sequence.num_uncomputed
            assert sequence in self.scheduler.running
            room = len(sequence.block_table) * self.block_size
            assert room >= scheduled.start + scheduled.num_tokens
        if rests and self.live:
            # The engine sleeps now, and only a load that ends can wake it.
            loading = {ref for ref, _ in self.host.pending}
            needed = {ref for s in self.live for ref in s.adapter_refs}
            assert needed & loading, "would sleep for ever"

    def _compute(self, schedule: Schedule) -> None:
        for scheduled in schedule:
            self._visit(scheduled, write=True)
        for scheduled in schedule:
            self._visit(scheduled, write=False)
            for ref in scheduled.sequence.adapter_refs:
                bound = self.scheduler.bound_adapter(ref)
                assert isinstance(bound, FakeBound)
                for page in bound.pages:
                    assert self.memory[page] == [bound.digest] * self.block_size

    def _visit(self, scheduled: ScheduledSequence, write: bool) -> None:
        """Writes the KV of a step's tokens, or reads all that they look at."""
        sequence, first = scheduled.sequence, scheduled.start
        content = hash(self.namespace(sequence))
        for position in range(first + scheduled.num_tokens):
            content = hash((content, sequence.token_ids[position]))
            page = self.memory[sequence.block_table[position // self.block_size]]
            place = position % self.block_size
            if not write:
                assert page[place] == content, "reads KV that is not its own"
            elif position >= first:
                page[place] = content


def next_token(sequence: Sequence) -> int:
    """A stand-in for the model: depends on all tokens so far."""
    return hash(tuple(sequence.token_ids)) % VOCABULARY


def most_steps(sequence: Sequence) -> int:
    """How many steps a sequence takes at one token a step."""
    return sequence.num_prompt_tokens + sequence.request.sampling.max_tokens


@pytest.fixture(scope="session")
def world() -> type[World]:
    """The class itself: tests make the worlds they need."""
    return World


@pytest.fixture(scope="session")
def tokenizer(default_checkpoint: Checkpoint) -> Tokenizer:
    """The default model's."""
    return default_checkpoint.tokenizer
