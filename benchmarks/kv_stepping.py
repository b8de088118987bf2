"""Decode steps over a KV cache of any format and selection, at contexts that were never computed.

All pages are filled with random keys and values, through the format's own way to store them. What
sequences hold of them, and what of it a step reads, the engine's rules and books decide.
"""

from __future__ import annotations

import time
from copy import copy
from typing import NoReturn

import torch

from benchmarks.kv_reader import Way
from benchmarks.mixed_kinds import MadeAdapters
from polydelta.adapters_store.host_store import HostStore
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.eviction import CostModel
from polydelta.engine.host_pages import DistantPages
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.pool import PagePool
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.runner import Runner
from polydelta.engine.sequence import ScheduledSequence, Sequence
from polydelta.kernels.kv_eviction import SequenceState
from polydelta.kernels.kv_selection import H2O, DoubleSparsity, InfLLM, parse_selection
from polydelta.kernels.ops import SequenceSlice

# Tokens by which the contexts of a batch differ, so that their pages do not end together.
STAGGER = 5


class Stepping:
    """Sequences of one way that decode together; for one thread."""

    def __init__(
        self, decoder: Decoder, way: Way, dtype: torch.dtype, longest: int, most_rows: int
    ) -> None:
        """decoder: as it was made, and it stays so. longest: tokens of a sequence; most_rows:
        sequences at the same time."""
        config, kernels = decoder.config, decoder.kernels
        selection = parse_selection(way.selection)
        # Which channels are labels is the same for the time that it takes.
        channels = torch.arange(config.head_dim // DoubleSparsity.label_share)
        labels = channels.repeat(config.num_layers, config.num_kv_heads, 1)
        self.way = way
        self.spec = KVSpec.of(config, dtype, None, way.format, selection, labels)
        self._selection = selection
        self._rules = KVRules(selection, None, way.format, self.spec.format.by_page)
        each = -(-longest // self.spec.block_size)
        self._num_pages = each * most_rows
        self._runner = Runner(
            _bare(decoder),
            kernels,
            self._num_pages,
            self.spec,
            HostStore(MadeAdapters(), 0),
            max_positions=longest,
            rules=self._rules,
            slots=most_rows,
        )
        self._distant: DistantPages | None = None
        if isinstance(selection, InfLLM):
            host_bytes = self._num_pages * self.spec.page_bytes * config.num_layers
            host = self._runner.host_kv(host_bytes, lambda *_: None, is_read=True)
            self._distant = DistantPages(host, self._num_pages)
        self._fill(each)
        self._books = self._new_books()
        self._sequences: list[Sequence] = []

    def begin(self, rows: int, context: int, steps: int) -> None:
        """Others in the place of those there are, which see `context` tokens after so many
        steps; those in a batch some less."""
        for sequence in self._sequences:
            self._books.release(sequence)
        self._books = self._new_books()
        self._sequences = [
            self._sequence(context - steps - STAGGER * number) for number in range(rows)
        ]

    @property
    def held_bytes(self) -> int:
        """Of the pool, and outside of pages, by the sequences there are."""
        page_bytes = self.spec.page_bytes + self.spec.noted_bytes
        pages = self._books.num_used_pages * page_bytes * self.spec.config.num_layers
        return pages + self.spec.open_bytes * len(self._sequences)

    @torch.inference_mode()
    def step(self) -> float:
        """Seconds of one token for each."""
        for sequence in self._sequences:
            self._books.grow(sequence, sequence.num_computed + 1)
        schedule = [ScheduledSequence(sequence, 1) for sequence in self._sequences]
        began = time.perf_counter()
        sampled = self._runner.launch(schedule, _no_adapter).wait()
        seconds = time.perf_counter() - began
        for sequence, token in zip(self._sequences, sampled, strict=True):
            assert token is not None
            sequence.token_ids.append(token.token_id)
            sequence.num_computed += 1
            self._leave(sequence)
        return seconds

    def _new_books(self) -> KVCache:
        """For a pool in which nothing is used."""
        pool, size = PagePool(self._num_pages), self.spec.block_size
        return KVCache(pool, size, CostModel(), False, rules=self._rules, distant=self._distant)

    def _sequence(self, prompt: int) -> Sequence:
        """As it is when its first token is sampled."""
        params = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)
        sequence = Sequence(GenerationRequest("some", [1] * prompt, params), lambda _: None)
        sequence.knows_traits = True
        self._books.admit(sequence, [])
        self._books.grow(sequence, prompt)
        sequence.token_ids.append(1)
        sequence.num_computed = prompt
        self._leave(sequence)
        if isinstance(self._selection, H2O):
            self._receive_attention(sequence, self._selection.kept(prompt))
        return sequence

    def _leave(self, sequence: Sequence) -> None:
        """What is not read any more, or seldom."""
        self._books.drop_evicted(sequence)
        if self._books.leaves_pages(sequence):
            self._books.leave_pages(sequence)

    def _receive_attention(self, sequence: Sequence, kept: int) -> None:
        """What h2o knows of a sequence whose prompt it has shrunk."""
        heads = self.spec.config.num_kv_heads
        prompt = sequence.num_prompt_tokens
        eviction = self._runner._kv._attention(None)._eviction
        for layer in range(self.spec.config.num_layers):
            received = torch.rand(heads, kept, dtype=torch.float64)
            positions = torch.arange(prompt - kept, prompt).repeat(heads, 1)
            state = SequenceState(received, positions, prompt)
            eviction._sequences[sequence.slot][layer] = state

    @torch.inference_mode()
    def _fill(self, each: int) -> None:
        """each: pages of the longest sequence. One of them is stored in the first layer; the rest
        is like it."""
        config, kv, storage = self.spec.config, self._runner._kv, self._runner._storage
        tokens = each * self.spec.block_size
        random = torch.Generator().manual_seed(0)
        shape = (2, tokens, config.num_kv_heads, config.head_dim)
        keys, values = torch.randn(shape, generator=random).to(self.spec.dtype)
        kv.prepare(torch.arange(tokens), [SequenceSlice(0, tokens, tokens, range(each), slot=0)])
        kv.store(0, keys, values)
        storage[1:, :each] = storage[0, :each]
        for first in range(each, self._num_pages, each):
            storage[:, first : first + each] = storage[:, :each]


def _bare(decoder: Decoder) -> Decoder:
    """One with the same weights, which a runner may wrap."""
    made = copy(decoder)
    made.layers = []
    for layer in decoder.layers:
        own = copy(layer)
        own.attention, own.mlp = copy(layer.attention), copy(layer.mlp)
        made.layers.append(own)
    return made


def _no_adapter(_: AdapterRef) -> NoReturn:
    raise AssertionError("No sequence has an adapter.")
