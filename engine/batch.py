"""One step's tensors, from the schedule: flat tokens, where their KV goes, and whose they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from polydelta.adapters_store.composition import Shares
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.page_copies import PageCopy
from polydelta.engine.sequence import Schedule, ScheduledSequence, Sequence as TokenSequence
from polydelta.kernels.ops import SequenceSlice
from polydelta.kernels.upload import upload

CPU = torch.device("cpu")
PLAIN = KVRules()


@dataclass(frozen=True)
class AdapterRows:
    """Rows that the same adapters act on: start : stop."""

    start: int
    stop: int
    adapters: Shares


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of one forward pass. Rows are sorted by adapters, the bare base's first."""

    # Sequences in the order of their rows.
    scheduled: Sequence[ScheduledSequence]
    # [tokens] int64
    tokens: Tensor
    # [tokens] int64; virtual tokens have the positions before a sequence's first token
    positions: Tensor
    # [tokens] int64: page * block_size + place, where each token's KV goes
    slots: Tensor
    slices: Sequence[SequenceSlice]
    # Copied in every layer before the step stores its own.
    page_copies: Sequence[PageCopy]
    # Of the flat batch. In none of them: rows of the bare base, and those of a sequence before
    # the token from which its adapter acts.
    adapter_rows: Sequence[AdapterRows]
    # [samples] int64: the last row of each sequence that a token is sampled for
    sample_rows: Tensor
    # As `adapter_rows`, but of the rows that `sample_rows` selects.
    sample_adapter_rows: Sequence[AdapterRows]
    # The sequences of `sample_rows`, in their order.
    sampling: Sequence[ScheduledSequence]
    # Rows whose token is what the step before it samples for the sequence: below 0 in `tokens`.
    unknown: Sequence[tuple[int, TokenSequence]]

    @property
    def decodes_only(self) -> bool:
        """Whether each sequence has one row, which is sampled."""
        # Answers that are computed again may be several slices of one sequence.
        one_each = len(self.tokens) == len(self.slices)
        alone = all(item.num_tokens == 1 for item in self.scheduled)
        return one_each and alone and len(self.scheduled) == len(self.sample_rows)

    def padded(self, rows: int) -> Batch:
        """With so many rows: those added belong to nobody, have no context and store nothing."""
        missing = rows - len(self.tokens)
        if not missing:
            return self
        empty = [SequenceSlice(row, 1, 0, ()) for row in range(len(self.tokens), rows)]
        return replace(
            self,
            tokens=pad(self.tokens, (0, missing)),
            positions=pad(self.positions, (0, missing)),
            slots=pad(self.slots, (0, missing), value=-1),
            slices=[*self.slices, *empty],
        )


def build_batch(
    schedule: Schedule,
    block_size: int,
    device: torch.device = CPU,
    rules: KVRules = PLAIN,
) -> Batch:
    """block_size: tokens of a page; rules: what sequences read of their KV."""
    ordered = sorted(schedule, key=_adapter_names)
    sampling = [item for item in ordered if item.samples]
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    slices: list[SequenceSlice] = []
    adapter_rows: list[AdapterRows] = []
    sample_rows: list[int] = []
    unknown: list[tuple[int, TokenSequence]] = []
    for item in ordered:
        sequence, first = item.sequence, len(tokens)
        virtual = sequence.num_prefix_tokens
        tokens += sequence.token_ids[item.start : item.stop]
        positions += range(virtual + item.start, virtual + item.stop)
        slots += _slots(item, block_size)
        slices += _slices(item, first, rules)
        acts_from = first + item.num_before_activation
        adapter_rows.append(AdapterRows(acts_from, len(tokens), sequence.adapters))
        if item.samples:
            sample_rows.append(len(tokens) - 1)
        if item.stop > sequence.num_known:
            unknown.append((len(tokens) - 1, sequence))
    each = (tokens, positions, slots, sample_rows)
    on_device = upload([value for values in each for value in values], device)
    tokens_, positions_, slots_, sample_rows_ = on_device.split([len(values) for values in each])
    return Batch(
        ordered,
        tokens_,
        positions_,
        slots_,
        slices,
        _page_copies(ordered, block_size),
        _merged(adapter_rows),
        sample_rows_,
        _merged(
            AdapterRows(row, row + 1, item.sequence.adapters)
            for row, item in enumerate(sampling)
            if item.num_before_activation < item.num_tokens
        ),
        sampling,
        unknown,
    )


def _adapter_names(item: ScheduledSequence) -> list[str]:
    return [share.name for share in item.sequence.adapters]


def _slices(item: ScheduledSequence, row: int, rules: KVRules) -> Iterator[SequenceSlice]:
    """Of the rows from `row` on, cut where what they read changes."""
    sequence = item.sequence
    pages = sequence.prefix_pages + sequence.block_table
    prompt = sequence.num_prefix_tokens + sequence.num_prompt_tokens
    context = sequence.num_prefix_tokens + item.start - sequence.num_evicted
    for length, selection in rules.parts(item):
        context += length
        yield SequenceSlice(row, length, context, pages, selection, sequence.slot, prompt)
        row += length


def _slots(item: ScheduledSequence, block_size: int) -> list[int]:
    """Where the KV of each token goes: into the sequence's own pages, never its adapter's."""
    sequence = item.sequence
    pages = sequence.block_table
    shift = sequence.num_prefix_tokens % block_size - sequence.num_evicted
    places = range(shift + item.start, shift + item.stop)
    return [pages[place // block_size] * block_size + place % block_size for place in places]


def _page_copies(ordered: Iterable[ScheduledSequence], block_size: int) -> list[PageCopy]:
    """For those who begin in this step: their adapter's last virtual tokens."""
    return [
        PageCopy(
            item.sequence.prefix_rest,
            item.sequence.block_table[0],
            item.sequence.slot,
            item.sequence.num_prefix_tokens % block_size,
        )
        for item in ordered
        if item.start == 0 and item.sequence.prefix_rest is not None
    ]


def _merged(each: Iterable[AdapterRows]) -> list[AdapterRows]:
    """Neighbours with the same adapters as one; without what is empty, or the bare base's."""
    merged: list[AdapterRows] = []
    for rows in each:
        if rows.start == rows.stop or not rows.adapters:
            continue
        last = merged[-1] if merged else None
        if last and (last.stop, last.adapters) == (rows.start, rows.adapters):
            merged[-1] = replace(last, stop=rows.stop)
        else:
            merged.append(rows)
    return merged
