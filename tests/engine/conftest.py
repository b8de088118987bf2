"""What the engine's tests share: a scheduler with all its managers, over make-believe memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from polydelta.adapters_store.composition import Share, combine
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.load_times import LoadTimes
from polydelta.adapters_store.reference import AdapterRef
from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.adapter_control import AdapterControl
from polydelta.engine.adapter_usage import AdapterUsage
from polydelta.engine.batch import AdapterRows, Batch, build_batch
from polydelta.engine.eviction import CostModel
from polydelta.engine.host_adapter import HostAdapter
from polydelta.engine.host_pages import DistantPages
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.tokenizer import Tokenizer
from polydelta.engine.overload import QueueLimits
from polydelta.engine.policies import POLICIES
from polydelta.engine.pool import PageAllocator
from polydelta.engine.pools import Pools
from polydelta.engine.preemption import Preemption, Swapping
from polydelta.engine.request import FinishReason, GenerationRequest, RequestError, SamplingParams
from polydelta.engine.residency import Residency
from polydelta.engine.scheduler import Scheduler, SchedulerLimits
from polydelta.engine.sequence import (
    GIVEN_BACK,
    SampledToken,
    Schedule,
    ScheduledSequence,
    Sequence,
)
from polydelta.engine.stats import EngineStats
from polydelta.engine.stats_recorder import StatsRecorder
from polydelta.kernels.kv_selection import EVICTING, FULL, H2O, Selection, SnapKV, Window
from polydelta.kernels.ops import SequenceSlice

PAGE_BYTES = 100
VOCABULARY = 50
ORDINARY = AdapterTraits()
NO_LIMITS = QueueLimits()
PLAIN = KVRules()


@dataclass(frozen=True)
class FakeAdapter:
    """A packed adapter without bytes."""

    digest: str
    bytes_per_layer: int
    traits: AdapterTraits = ORDINARY

    @property
    def nbytes(self) -> int:
        return 3 * self.bytes_per_layer


@dataclass(frozen=True)
class FakeBound:
    """An adapter in the pool: what should lie in which pages."""

    content: Mapping[int, list[object]]


@dataclass
class FakeHost:
    """A host tier whose loads end when the test says so."""

    # Adapter id -> size of its weights in pages, digest where it is not the id itself, and what
    # it does to whole sequences where it is not an ordinary one.
    sizes: Mapping[str, int]
    digests: Mapping[str, str] = field(default_factory=dict)
    traits: Mapping[str, AdapterTraits] = field(default_factory=dict)
    # Every load that was asked for, and those that have not ended.
    asked: list[str] = field(default_factory=list)
    pending: list[tuple[AdapterRef, Future[HostAdapter]]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    # What it is said to take to have each once more.
    seconds: Mapping[str, float] = field(default_factory=dict)

    def load(self, ref: AdapterRef) -> Future[HostAdapter]:
        future: Future[HostAdapter] = Future()
        self.asked.append(ref.id)
        self.pending.append((ref, future))
        return future

    def forget(self, ref: AdapterRef) -> None:
        self.forgotten.append(ref.id)

    def holds(self, ref: AdapterRef) -> bool:
        return False

    def reload_seconds(self, ref: AdapterRef) -> float:
        return self.seconds.get(ref.id, 0.0)

    def finish(self, adapter_id: str | None = None) -> None:
        """Ends the pending loads of one adapter, or all."""
        for ref, future in self._take(adapter_id):
            future.set_result(
                FakeAdapter(
                    self.digest(ref),
                    max(0, self.sizes[ref.id] * PAGE_BYTES - 1),
                    self.traits.get(ref.id, ORDINARY),
                )
            )

    def digest(self, ref: AdapterRef) -> str:
        return self.digests.get(ref.id, f"digest of {ref.id}")

    def fail(self, adapter_id: str | None, error: str) -> None:
        for _, future in self._take(adapter_id):
            future.set_exception(InvalidAdapterError(error))

    def _take(self, adapter_id: str | None) -> list[tuple[AdapterRef, Future[HostAdapter]]]:
        taken = [load for load in self.pending if adapter_id in (None, load[0].id)]
        self.pending = [load for load in self.pending if load not in taken]
        return taken


class FakeHostKV:
    """Host pages that hold what the world's pages do. Copies are for nothing: all that has room is
    swapped."""

    page_bytes = 3 * PAGE_BYTES

    def __init__(self, memory: dict[int, list[object]], num_pages: int) -> None:
        self._memory = memory
        self._allocator = PageAllocator(num_pages)
        self._saved: dict[int, list[object]] = {}

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_used(self) -> int:
        return self._allocator.num_pages - self.num_free

    def save(self, pages: Seq[int]) -> list[int]:
        assert 0 < len(pages) <= self.num_free
        saved = self._allocator.take(len(pages))
        self._saved |= {to: list(self._memory[page]) for to, page in zip(saved, pages, strict=True)}
        return saved

    def content(self, page: int) -> list[object]:
        return self._saved[page]

    def restore(self, saved: Seq[int], pages: Seq[int]) -> None:
        for source, page in zip(saved, pages, strict=True):
            self._memory[page] = list(self._saved[source])

    def drop(self, saved: Seq[int]) -> None:
        self._allocator.give_back(saved)
        for page in saved:
            del self._saved[page]


def make_ref(adapter_id: str) -> AdapterRef:
    return AdapterRef(adapter_id, 1, Path("unused"))


class World:
    """A scheduler and its managers. Memory holds names in place of numbers: of a token's KV, all
    tokens that it follows from and the digests of the adapters that acted on them; of a page of an
    adapter's weights, its digest. Every step checks that what it reads is what it should be, by
    the very batch that the engine makes of its schedule."""

    def __init__(
        self,
        num_pages: int = 16,
        block_size: int = 4,
        max_batch_tokens: int = 64,
        max_batch_size: int = 8,
        prefix_caching: bool = True,
        adapters: Mapping[str, int] | None = None,
        digests: Mapping[str, str] | None = None,
        traits: Mapping[str, AdapterTraits] | None = None,
        max_positions: int = 10_000,
        lag: int = 0,
        policy: str = "fcfs",
        adapter_share: float | None = None,
        queue: QueueLimits = NO_LIMITS,
        host_kv_pages: int = 0,
        rules: KVRules = PLAIN,
    ) -> None:
        """adapters: weights of each, in pages. lag: steps that are under way when the next one is
        scheduled. host_kv_pages: where preempted sequences are swapped to, and infllm's blocks; 0:
        they are recomputed, and stay. rules: formats and selections.
        """
        self.block_size = block_size
        self.limits = SchedulerLimits(max_batch_tokens, max_batch_size, max_positions, queue)
        self.pools = Pools.of(num_pages, adapter_share)
        # Of KV, and unless it was split, of adapters.
        self.pool = self.pools.kv
        # What the scheduler takes for the time; a test may move it.
        self.now = 0.0
        self.host = FakeHost(adapters or {}, digests or {}, traits or {})
        costs = CostModel()
        self.num_wakes = 0
        self.residency = Residency(
            self.pools.adapters,
            PAGE_BYTES,
            block_size,
            self.host,
            self._bind,
            costs,
            self._wake,
            AdapterUsage(most_named=10),
        )
        is_gone = self.residency.is_doomed
        # page -> what each of its places holds
        self.memory: dict[int, list[object]] = {
            page: [None] * block_size for page in range(num_pages)
        }
        self.host_kv = FakeHostKV(self.memory, host_kv_pages)
        self.rules = rules
        # Where the format is by page: slot -> what is not a whole page yet.
        self.open: dict[int, list[object]] = {
            slot: [None] * block_size for slot in range(max_batch_size)
        }
        self.kv = KVCache(
            self.pool,
            block_size,
            costs,
            prefix_caching,
            is_gone,
            rules,
            DistantPages(self.host_kv, num_pages) if host_kv_pages else None,
        )
        swapping = Swapping(self.kv, costs, self.host_kv)
        self.scheduler = Scheduler(
            self.limits,
            POLICIES[policy](),
            self.pools,
            self.kv,
            self.residency,
            swapping if host_kv_pages else Preemption(),
            lambda: self.now,
        )
        self.control = AdapterControl(self.pools, self.kv, self.residency, self.scheduler)
        self.recorder = StatsRecorder(self.pools, self.kv, self.residency, costs, LoadTimes())
        self.orders: list[Future[None]] = []
        self.submitted: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.failed: dict[Sequence, str] = {}
        self.errors: dict[Sequence, RequestError] = {}
        self.lag = lag
        self.under_way: deque[tuple[Schedule, list[SampledToken | None]]] = deque()
        # All tokens of each sequence, those that the scheduler does not know yet as well.
        self.tokens: dict[Sequence, list[int]] = {}

    @property
    def live(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def submit(
        self,
        prompt: Iterable[int],
        adapter: str | None = None,
        max_tokens: int = 1,
        tenant: str = "",
        weight: float = 1.0,
        priority: int = 0,
        cache_salt: str = "",
        kv_select: Selection | None = None,
    ) -> Sequence:
        """adapter: an id, or several with a + between them."""
        names = adapter.split("+") if adapter else []
        request = GenerationRequest(
            str(len(self.submitted)),
            tuple(prompt),
            SamplingParams(max_tokens),
            combine(Share(make_ref(name)) for name in names),
            tenant=tenant,
            weight=weight,
            priority=priority,
            cache_salt=cache_salt,
            kv_select=kv_select,
            # In the order of submission, however fast they come.
            arrived=self.now + len(self.submitted) * 1e-9,
        )
        sequence = Sequence(request, lambda output: None)
        self.submitted.append(sequence)
        self.tokens[sequence] = list(sequence.token_ids)
        self.recorder.arrived(sequence)
        self.scheduler.add(sequence)
        return sequence

    def stats(self) -> EngineStats:
        return self.recorder.snapshot(self.scheduler)

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
        self.errors |= {f.sequence: f.error for f in failures}
        self.failed |= {f.sequence: f.error.message for f in failures}
        rests = not schedule and not failures and not self.under_way
        self._check_schedule(schedule, rests)
        self._compute(schedule)
        tokens = [self._sample(item) if item.samples else None for item in schedule]
        self.scheduler.advance(schedule)
        self.under_way.append((schedule, tokens))
        while len(self.under_way) > (self.lag if schedule else 0):
            self._commit(*self.under_way.popleft())
        self.check()
        return schedule

    def _sample(self, item: ScheduledSequence) -> SampledToken:
        tokens = self.tokens[item.sequence]
        token = next_token(tokens)
        tokens.append(token)
        return SampledToken(token)

    def _commit(self, schedule: Schedule, tokens: list[SampledToken | None]) -> None:
        gone = [item.sequence.has_left for item in schedule]
        tokens = [None if left else t for left, t in zip(gone, tokens, strict=True)]
        self.scheduler.commit(schedule, tokens)
        self.recorder.step(schedule, tokens, 0.01)
        for scheduled, token in zip(schedule, tokens, strict=True):
            sequence = scheduled.sequence
            if token is None:
                continue
            known = sequence.num_known - sequence.num_prompt_tokens
            enough = known == sequence.request.sampling.max_tokens
            tokens_in_all = sequence.num_known + self.num_virtual(sequence)
            assert self.scheduler.is_full(sequence) == (tokens_in_all >= self.limits.max_positions)
            if enough or self.scheduler.is_full(sequence):
                self.scheduler.remove(sequence)
                self.finished.append(sequence)
                self.recorder.finished(sequence, FinishReason.LENGTH)

    def drain(self) -> None:
        """Ends every load and steps until nobody is left; fails when that takes too long."""
        for _ in range(50 + 20 * sum(map(most_steps, self.live))):
            idle = not self.live and not self.under_way
            if idle and all(order.done() for order in self.orders):
                return
            self.step()
            self.host.finish()
        raise AssertionError(f"{len(self.live)} sequences never finished")

    def check(self) -> None:
        """What holds between any two steps."""
        self.scheduler.check_integrity()
        now = self.stats()
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
            assert self._places(sequence) >= sequence.num_computed - sequence.num_evicted
            for index, page in enumerate(sequence.block_table):
                if page == GIVEN_BACK or page >= self.pools.num_pages:
                    continue
                owners.setdefault(page, []).append((sequence, index))
        for users in owners.values():
            published = all(index < sequence.num_published for sequence, index in users)
            assert len(users) == 1 or published, "a page that was not published has two users"
        slots = [sequence.slot for sequence in self.scheduler.running]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.limits.max_batch_size for slot in slots)
        waits_again = any(sequence.num_preemptions for sequence in self.scheduler.waiting)
        distant = sum(map(self._num_distant, self.scheduler.running))
        assert waits_again or now.host_kv_bytes == distant * self.host_kv.page_bytes
        for sequence in self.scheduler.waiting:
            assert not sequence.block_table
            assert (sequence.slot, sequence.num_evicted, sequence.num_computed) == (-1, 0, 0)
            assert (sequence.prefix_pages, sequence.prefix_rest) == ([], None)

    def traits(self, sequence: Sequence) -> list[AdapterTraits]:
        return [self.host.traits.get(ref.id, ORDINARY) for ref in sequence.adapter_refs]

    def num_virtual(self, sequence: Sequence) -> int:
        return sum(traits.num_prefix_tokens for traits in self.traits(sequence))

    def activation(self, sequence: Sequence) -> int | None:
        """Index of the first token that the adapters act on; None when there is none."""
        prompt = sequence.request.prompt_token_ids
        for traits in self.traits(sequence):
            wanted = traits.invocation
            if wanted:
                ends = range(len(wanted), len(prompt) + 1)
                found = [e for e in ends if prompt[e - len(wanted) : e] == wanted]
                return found[-1] - len(wanted) if found else None
        return 0

    def _wake(self) -> None:
        self.num_wakes += 1

    def _bind(self, packed: HostAdapter, pages: Seq[int]) -> FakeBound:
        """The weights' pages first, then those of its virtual tokens, page by page."""
        num_virtual, size = packed.traits.num_prefix_tokens, self.block_size
        num_prefix_pages = -(-num_virtual // size)
        num_weight_pages = len(pages) - num_prefix_pages
        content = {page: [packed.digest] * size for page in pages[:num_weight_pages]}
        virtual = [*virtual_content(packed.digest, num_virtual), *[None] * size]
        for number, page in enumerate(pages[num_weight_pages:]):
            content[page] = virtual[number * size : (number + 1) * size]
        self.memory |= {page: list(places) for page, places in content.items()}
        return FakeBound(content)

    def _check_schedule(self, schedule: Schedule, rests: bool) -> None:
        assert sum(s.num_tokens for s in schedule) <= self.limits.max_batch_tokens
        assert len(schedule) <= self.limits.max_batch_size
        assert len({s.sequence for s in schedule}) == len(schedule)
        for scheduled in schedule:
            sequence = scheduled.sequence
            assert 1 <= scheduled.num_tokens <= sequence.num_uncomputed
            assert sequence in self.scheduler.running
            assert self._places(sequence) >= scheduled.stop - sequence.num_evicted
            self._check_chunk(scheduled)
        if rests and self.live:
            # The engine sleeps now, and only a load that ends can wake it.
            loading = {ref for ref, _ in self.host.pending}
            needed = {ref for s in self.live for ref in s.adapter_refs}
            deadline = self.scheduler.seconds_to_deadline()
            assert needed & loading or deadline is not None, "would sleep for ever"

    def _places(self, sequence: Sequence) -> int:
        """Room for tokens in a sequence's own pages, beside its adapter's last virtual ones."""
        shared = self.num_virtual(sequence) % self.block_size
        return len(sequence.block_table) * self.block_size - shared

    def _num_distant(self, sequence: Sequence) -> int:
        return sum(page >= self.pools.num_pages for page in sequence.block_table)

    def _check_chunk(self, item: ScheduledSequence) -> None:
        """It ends where its selection and its prefill need it to."""
        selection, prompt = self.rules.of(item.sequence), item.sequence.num_prompt_tokens
        if item.start >= prompt:
            assert item.num_tokens == 1 or not isinstance(selection, H2O)
            return
        if isinstance(selection, EVICTING):
            assert item.stop <= prompt
            assert item.stop < prompt or item.num_tokens >= min(SnapKV.window, prompt)
        if (prefill := self.rules.prefill) is not None:
            virtual = item.sequence.num_prefix_tokens
            assert not item.start or (virtual + item.start) % prefill.block == 0
            assert item.stop == prompt or (virtual + item.stop) % prefill.block == 0

    def _compute(self, schedule: Schedule) -> None:
        """What the runner does: copies pages, stores the step's KV, reads all that it looks at."""
        if not schedule:
            return
        batch = build_batch(schedule, self.block_size, rules=self.rules)
        self._check_rows(batch)
        due = [s.sequence for s in batch.scheduled if not s.start and self._is_shifted(s.sequence)]
        assert [copy.target for copy in batch.page_copies] == [s.block_table[0] for s in due]
        for copy in batch.page_copies:
            content = list(self.memory[copy.source])
            if self.rules.by_page:
                self.open[copy.slot] = content
            else:
                self.memory[copy.target] = content
        positions, slots = batch.positions.tolist(), batch.slots.tolist()
        contents = {s.sequence: self._content(s.sequence) for s in schedule}
        for item, parts in self._parts(batch):
            for row in range(parts[0].start, parts[0].start + item.num_tokens):
                self._store(item.sequence, slots[row], contents[item.sequence][positions[row]])
        for item, parts in self._parts(batch):
            assert parts[-1].context == self.num_virtual(item.sequence) + (
                item.stop - item.sequence.num_evicted
            )
            last = (parts[-1].context - 1) // self.block_size
            for part in parts:
                self._check_reads(item.sequence, part, contents[item.sequence], last)
            self._evict(item, contents[item.sequence])
            for ref in item.sequence.adapter_refs:
                bound = self.scheduler.bound_adapter(ref)
                assert isinstance(bound, FakeBound)
                for page, content in bound.content.items():
                    assert self.memory[page] == content, "somebody wrote into an adapter's page"

    def _parts(self, batch: Batch) -> list[tuple[ScheduledSequence, list[SequenceSlice]]]:
        """What each of a step's sequences reads, one slice after the other."""
        slices = deque(batch.slices)
        found = []
        for item in batch.scheduled:
            parts: list[SequenceSlice] = []
            while sum(part.length for part in parts) < item.num_tokens:
                parts.append(slices.popleft())
            found.append((item, parts))
        return found

    def _store(self, sequence: Sequence, slot: int, content: object) -> None:
        """slot: page * block_size + place."""
        page, place = divmod(slot, self.block_size)
        if not self.rules.by_page:
            self.memory[page][place] = content
            return
        self.open[sequence.slot][place] = content
        if place == self.block_size - 1:
            self.memory[page] = list(self.open[sequence.slot])

    def _check_reads(
        self, sequence: Sequence, part: SequenceSlice, contents: list[object], last: int
    ) -> None:
        """Every place that the queries of a slice see is the sequence's own, and holds what the
        sequence would have computed itself. last: the block that the step ends in."""
        expected = self._expected(sequence, part.context + sequence.num_evicted, contents)
        assert len(expected) == part.context
        oldest = part.context - part.length
        used = {*self.kv.used_pages(), *sequence.prefix_pages}
        for place, content in enumerate(expected):
            match part.selection:
                case Window(sinks, recent) if sinks <= place <= oldest - recent:
                    continue
            block = place // self.block_size
            page = part.pages[block]
            if self.rules.by_page and block == last:
                held = self.open[part.slot]
            elif page >= self.pools.num_pages:
                held = self.host_kv.content(page - self.pools.num_pages)
            else:
                assert page in used, "reads a page that is not its own"
                held = self.memory[page]
            assert held[place % self.block_size] == content, "reads KV that is not its own"

    def _expected(self, sequence: Sequence, stop: int, contents: list[object]) -> list[object]:
        """What lies in a sequence's places when `stop` tokens are stored, virtual ones counted."""
        selection, prompt = self.rules.of(sequence), sequence.num_prompt_tokens
        if not isinstance(selection, EVICTING) or stop <= prompt:
            return contents[:stop]
        steps = stop - prompt - 1 if isinstance(selection, H2O) else 0
        return (
            self._kept(selection, prompt, contents[prompt + steps - 1])
            + (contents[prompt + steps : stop])
        )

    def _kept(self, selection: SnapKV | H2O, prompt: int, after: object) -> list[object]:
        """What stays when tokens were evicted behind one of them."""
        return [hash((after, "kept", place)) for place in range(selection.kept(prompt))]

    def _evict(self, item: ScheduledSequence, contents: list[object]) -> None:
        """Behind a prompt, and for h2o behind each answer's token: what stays moves together."""
        sequence, prompt = item.sequence, item.sequence.num_prompt_tokens
        selection = self.rules.of(sequence)
        if not isinstance(selection, EVICTING) or item.stop < prompt:
            return
        if item.stop == prompt or isinstance(selection, H2O):
            for place, content in enumerate(self._kept(selection, prompt, contents[item.stop - 1])):
                block, rest = divmod(place, self.block_size)
                slot = sequence.block_table[block] * self.block_size + rest
                self._store(sequence, slot, content)

    def _is_shifted(self, sequence: Sequence) -> bool:
        return self.num_virtual(sequence) % self.block_size > 0

    def _content(self, sequence: Sequence) -> list[object]:
        """KV of the virtual tokens and of all others, in the order of their positions."""
        digests = "+".join(map(self.host.digest, sequence.adapter_refs))
        activation = self.activation(sequence)
        contents = virtual_content(digests, self.num_virtual(sequence))
        for index, token in enumerate(self.tokens[sequence]):
            acts = activation is not None and index >= activation
            before = contents[-1] if contents else None
            way = self._way(sequence, index)
            contents.append(hash((before, token, digests if acts else "", way)))
        return contents

    def _way(self, sequence: Sequence, index: int) -> object:
        """What a token's KV depends on beside the tokens before it."""
        selection, prompt = self.rules.of(sequence), sequence.num_prompt_tokens
        if isinstance(selection, Window):
            return selection
        if index >= prompt:
            return None if selection == FULL and self.rules.prefill is None else selection
        if self.rules.prefill is None:
            return None
        virtual, block = self.num_virtual(sequence), self.rules.prefill.block
        first = (virtual + index) // block * block - virtual
        activation, refs = self.activation(sequence), sequence.adapter_refs
        return tuple(
            (
                self.tokens[sequence][other],
                "+".join(map(self.host.digest, refs))
                if activation is not None and other >= activation
                else "",
            )
            for other in range(max(0, first), min(prompt, first + block))
        )

    def _check_rows(self, batch: Batch) -> None:
        """Each row, and each sampled one, is in the segments of the adapters that act on it."""
        expected: list[object] = []
        positions = batch.positions.tolist()
        for item, parts in self._parts(batch):
            activation = self.activation(item.sequence)
            for row in range(parts[0].start, parts[0].start + item.num_tokens):
                index = positions[row] - self.num_virtual(item.sequence)
                assert batch.tokens[row] == item.sequence.token_ids[index]
                acts = activation is not None and index >= activation
                expected.append(item.sequence.adapters if acts else ())
        assert by_row(batch.adapter_rows, len(expected)) == expected
        sampled = [expected[row] for row in batch.sample_rows.tolist()]
        assert by_row(batch.sample_adapter_rows, len(sampled)) == sampled


def by_row(segments: Seq[AdapterRows], num_rows: int) -> list[object]:
    """The adapters of each row; () where it is in no segment."""
    rows: list[object] = [()] * num_rows
    for segment in segments:
        assert segment.start < segment.stop
        assert segment.adapters
        for row in range(segment.start, segment.stop):
            assert rows[row] == (), "a row in two segments"
            rows[row] = segment.adapters
    return rows


def virtual_content(digest: str, num_tokens: int) -> list[object]:
    """The KV of an adapter's virtual tokens."""
    return [hash((digest, "virtual", number)) for number in range(num_tokens)]


def next_token(token_ids: Seq[int]) -> int:
    """A stand-in for the model: depends on all tokens so far."""
    return hash(tuple(token_ids)) % VOCABULARY


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
