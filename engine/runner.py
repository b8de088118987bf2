"""Runs the decoder for one step over the pool's memory, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polydelta.adapters_store.host_store import HostStore
from polydelta.adapters_store.packed import PackedAdapter, PackedLayer
from polydelta.adapters_store.packed_deltas import PackedBias
from polydelta.adapters_store.packed_tensors import PackedVector
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.adapter_places import LINEARS_PER_LAYER
from polydelta.engine.batch import PLAIN, AdapterRows, Batch, build_batch
from polydelta.engine.deltas import AdapterSegment, StepDeltas, wrap_decoder
from polydelta.engine.fusion import Fusion, fusable_linears
from polydelta.engine.fusion_policy import FusionPolicy
from polydelta.engine.host_adapter import count_pages
from polydelta.engine.host_kv import HostKV, Observe
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.paged_kv import PagedKV
from polydelta.engine.pool_adapter import PoolAdapter
from polydelta.engine.prefix_kv import fill_prefix
from polydelta.engine.recorded_steps import RecordedSteps
from polydelta.engine.sampler import SampledTokens, Sampler
from polydelta.engine.sequence import SampledToken, Schedule, Sequence as TokenSequence
from polydelta.kernels.kv_selection import EVICTING, FULL
from polydelta.kernels.ops import Kernels, SequenceSlice
from polydelta.kernels.sampling import SamplingRows
from polydelta.kernels.upload import upload


class LaunchedStep:
    """A step under way."""

    def __init__(
        self, schedule: Schedule, sampling: Sequence[TokenSequence], sampled: SampledTokens
    ) -> None:
        """sampling: the sequences that a token is sampled for."""
        self._schedule = schedule
        self._sampling = sampling
        self._sampled = sampled

    def wait(self) -> list[SampledToken | None]:
        """The sampled token of each scheduled sequence, where one is due."""
        by_sequence = dict(zip(self._sampling, self._sampled.wait(), strict=True))
        return [by_sequence.get(item.sequence) for item in self._schedule]


class Runner:
    """The torch side of the engine: the model, the pool's memory, the sampler."""

    def __init__(
        self,
        decoder: Decoder,
        kernels: Kernels,
        num_pages: int,
        spec: KVSpec,
        host: HostStore,
        fuse_after: int | None = None,
        max_positions: int | None = None,
        steps_ahead: int = 0,
        rules: KVRules = PLAIN,
        slots: int = 1,
    ) -> None:
        """spec: how KV is stored. host: has the bytes of adapters that are to be fused. fuse_after:
        steps with one adapter alone before it goes into the base weights; None keeps all adapters
        unmerged. max_positions: tokens of the longest sequence. steps_ahead: 1 where a step may be
        launched before the tokens of the one before it are known, else 0. rules: what sequences
        read of their KV; slots: how many run at the same time."""
        config = decoder.config
        self._decoder = decoder
        self._kernels = kernels
        self._spec = spec
        self._rules = rules
        # [layers, pages, page_bytes]
        self._storage = kernels.zeros(config.num_layers, num_pages, spec.page_bytes)
        # The one that no sequence has: for what adapters put before them.
        self._spare_slot = slots
        self._kv = PagedKV(self._storage, spec, kernels, max_positions, slots + 1)
        self._deltas = StepDeltas(kernels)
        self._host = host
        self._fusion = self._policy = None
        if fuse_after is not None:
            self._fusion = Fusion(fusable_linears(decoder))
            self._policy = FusionPolicy(fuse_after)
        wrap_decoder(decoder, self._deltas)
        # The adapter that is in the base weights since the last step.
        self._was_fused: AdapterRef | None = None
        self._recorded = RecordedSteps(decoder, self._kv, self._deltas, kernels)
        self._sampler = Sampler(kernels)
        self.steps_ahead = steps_ahead
        # What the last step has sampled, and the place of each sequence in it.
        self._last_tokens = torch.empty(0, dtype=torch.int64, device=kernels.device)
        self._last_places: dict[TokenSequence, int] = {}
        # By slot, those of which tokens leave.
        self._evicting: dict[int, TokenSequence] = {}

    @property
    def device(self) -> torch.device:
        return self._kernels.device

    @property
    def pool_bytes(self) -> int:
        return self._storage.nbytes

    def host_kv(self, num_bytes: int, observe: Observe, is_read: bool = False) -> HostKV:
        """Host RAM for pages of this pool, made before the first of them is used; is_read: whether
        attention reads pages there. Raises ModelError."""
        host = HostKV(self._storage, num_bytes, observe)
        if is_read:
            self._kv.add_host_pages(host.memory)
        return host

    def enter_thread(self) -> None:
        """To be called by the thread that runs the steps, before its first."""
        self._kernels.enter_thread()

    @torch.inference_mode()
    def record_ahead(self, most_rows: int, report: Callable[[int, int], None]) -> None:
        """Records decode steps of all sizes as the server reads KV by itself, with and without
        adapters, or computes them once; computes prompts and draws a token. So no request waits
        for what is compiled, unless it asks to read otherwise.

        most_rows: sequences at the same time; report: given how many sizes are done, of all.
        """
        sizes = self._kernels.sizes_to_record(most_rows)
        if not sizes:
            return
        config, device, size = self._decoder.config, self._kernels.device, self._spec.block_size
        # A bias of zero for one column of each linear layer, read from a page that stays empty.
        zero = PackedVector(0, 1, torch.float32)
        biases = tuple(PackedBias(linear, 0, zero) for linear in range(LINEARS_PER_LAYER))
        layer = PackedLayer(torch.empty(0, dtype=torch.uint8), biases)
        packed = PackedAdapter("", self._spec.dtype, (layer,) * config.num_layers)
        idle = PoolAdapter(packed, self._storage, (0,), self._kernels)
        selection = self._rules.selection
        for done, rows in enumerate(sizes):
            report(done, len(sizes))
            batch = build_batch((), size, device).padded(rows)
            nobody = [replace(part, selection=selection) for part in batch.slices]
            # Steps that cannot be recorded do something with a page that becomes full, here with
            # the first one's. What evicts reads as full does.
            reads = FULL if isinstance(selection, EVICTING) else selection
            filling = [
                SequenceSlice(row, 1, 1 if row else size, (1,), reads, self._spare_slot)
                for row in range(rows)
            ]
            for segments in ((), (AdapterSegment(0, 1, idle),)):
                self._kv.prepare(batch.slots, nobody)
                self._deltas.begin(segments)
                if self._recorded.compute(batch) is None:
                    self._kv.prepare(batch.slots, filling)
                    hidden = self._decoder.hidden_states(batch.tokens, batch.positions, self._kv)
                    self._decoder.logits(hidden)
        # More rows than any recording has.
        rows = min(max(sizes) + 1, (self._storage.shape[1] - 1) * size)
        pages = range(1, 1 + -(-rows // size))
        batch = build_batch((), size, device).padded(rows)
        for chosen in dict.fromkeys((FULL, self._rules.of_prompts(selection))):
            whole = SequenceSlice(0, rows, rows, pages, chosen, self._spare_slot, prompt=rows)
            self._kv.prepare(batch.slots, [whole])
            self._deltas.begin([AdapterSegment(0, rows, idle)])
            hidden = self._decoder.hidden_states(batch.tokens, batch.positions, self._kv)
        self._kv.forget(self._spare_slot)
        half = torch.full((1,), 0.5, dtype=torch.float64, device=device)
        any_token = SamplingRows(half, torch.zeros_like(half), half, half, half)
        self._kernels.sample(self._decoder.logits(hidden[:1]), any_token)
        report(len(sizes), len(sizes))

    def bind_adapter(self, packed: PackedAdapter, pages: Sequence[int]) -> PoolAdapter:
        """Copies a packed adapter into pages of the pool, in the order of `count_pages`."""
        count = count_pages(packed, self._spec.page_bytes, self._spec.block_size).weights
        if packed.prefix is not None:
            # Virtual tokens are the bare base's.
            self._deltas.begin(())
            if self._fusion is not None:
                self._fusion.settle(None, self._host.peek)
            with torch.inference_mode():
                own = pages[count:]
                fill_prefix(packed.prefix, own, self._spare_slot, self._kv, self._decoder)
        return PoolAdapter(packed, self._storage, pages[:count], self._kernels)

    @torch.inference_mode()
    def launch(
        self, schedule: Schedule, bound: Callable[[AdapterRef], PoolAdapter]
    ) -> LaunchedStep:
        """Begins to compute a step; may return before it is done."""
        self._note_evicting(schedule)
        batch = build_batch(schedule, self._spec.block_size, self._kernels.device, self._rules)
        if batch.unknown:
            batch = self._with_last_tokens(batch)
        logits = self._logits(self._recorded.padded(batch), bound)
        sequences = [item.sequence for item in batch.sampling]
        sampled = self._sampler.sample(logits, sequences)
        self._last_tokens = sampled.tokens
        self._last_places = {sequence: place for place, sequence in enumerate(sequences)}
        return LaunchedStep(schedule, sequences, sampled)

    def _note_evicting(self, schedule: Schedule) -> None:
        """Drops what was kept of sequences that have left, or were preempted, where no other one
        takes over the slot."""
        for item in schedule:
            if isinstance(self._rules.of(item.sequence), EVICTING):
                self._evicting[item.sequence.slot] = item.sequence
        for slot, sequence in list(self._evicting.items()):
            if sequence.slot != slot:
                self._kv.forget(slot)
                del self._evicting[slot]

    def _with_last_tokens(self, batch: Batch) -> Batch:
        """Tokens that the last step samples, taken from where it puts them."""
        rows = [row for row, _ in batch.unknown]
        places = [self._last_places[sequence] for _, sequence in batch.unknown]
        device = self._kernels.device
        rows_on_device, places_on_device = upload([*rows, *places], device).chunk(2)
        chosen = self._last_tokens.index_select(0, places_on_device)
        return replace(batch, tokens=batch.tokens.index_copy(0, rows_on_device, chosen))

    def forget(self, sequence: TokenSequence) -> None:
        """Drops what the sampler kept for a sequence that has left."""
        self._sampler.forget(sequence)

    def forget_adapter(self, ref: AdapterRef) -> None:
        """Drops what is kept of an adapter that was evicted or deleted."""
        if self._fusion is not None:
            self._fusion.forget(ref)

    def _fused(self, batch: Batch) -> AdapterRef | None:
        """The adapter that is in the base weights in this step; all of its rows want it."""
        if self._fusion is None or self._policy is None:
            return None
        wanted = self._policy.wanted(item.sequence.adapters for item in batch.scheduled)
        return self._fusion.settle(wanted, self._host.peek)

    def _logits(self, batch: Batch, bound: Callable[[AdapterRef], PoolAdapter]) -> Tensor:
        """`[samples, vocab]` float32."""
        self._kv.copy(batch.page_copies)
        self._kv.prepare(batch.slots, batch.slices)
        fused = self._fused(batch)

        def segments(each: Sequence[AdapterRows]) -> list[AdapterSegment]:
            return [
                AdapterSegment(rows.start, rows.stop, bound(share.ref), share.weight)
                for rows in each
                for share in rows.adapters
                if share.ref != fused
            ]

        self._deltas.begin(segments(batch.adapter_rows), segments(batch.sample_adapter_rows))
        if fused != self._was_fused:
            # With an adapter in them, weights lie elsewhere than when a step was recorded.
            self._recorded.forget()
            self._was_fused = fused
        logits = self._recorded.compute(batch)
        if logits is not None:
            return logits
        hidden = self._decoder.hidden_states(batch.tokens, batch.positions, self._kv)
        return self._decoder.logits(hidden.index_select(0, batch.sample_rows))
