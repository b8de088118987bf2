"""One step's tensors, from the schedule: flat tokens, where their KV goes, and whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from polydelta.adapters_store.composition import Shares
from polydelta.engine.sequence import Schedule, ScheduledSequence
from polydelta.kernels.ops import SequenceSlice


@dataclass(frozen=True)
class AdapterRows:
    """Rows of the flat batch whose requests use the same adapters: start : stop."""

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
    # [tokens] int64
    positions: Tensor
    # [tokens] int64: page * block_size + place, where each token's KV goes
    slots: Tensor
    slices: Sequence[SequenceSlice]
    adapter_rows: Sequence[AdapterRows]
    # [samples] int64: the last row of each sequence that a token is sampled for
    sample_rows: Tensor
    # The sequences of `sample_rows`, in their order.
    sampling: Sequence[ScheduledSequence]


def build_batch(schedule: Schedule, block_size: int) -> Batch:
    ordered = sorted(schedule, key=_adapter_names)
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    slices: list[SequenceSlice] = []
    sample_rows: list[int] = []
    for item in ordered:
        sequence, first = item.sequence, len(tokens)
        places = range(item.start, item.start + item.num_tokens)
        tokens += sequence.token_ids[places.start : places.stop]
        positions += places
        pages = sequence.block_table
        slots += [pages[p // block_size] * block_size + p % block_size for p in places]
        slices.append(SequenceSlice(first, item.num_tokens, places.stop, pages))
        if item.samples:
            sample_rows.append(len(tokens) - 1)
    return Batch(
        ordered,
        torch.tensor(tokens),
        torch.tensor(positions),
        torch.tensor(slots),
        slices,
        _adapter_rows(ordered),
        torch.tensor(sample_rows, dtype=torch.int64),
        [item for item in ordered if item.samples],
    )


def _adapter_names(item: ScheduledSequence) -> list[str]:
    return [share.name for share in item.sequence.adapters]


def _adapter_rows(ordered: Sequence[ScheduledSequence]) -> list[AdapterRows]:
    rows: list[AdapterRows] = []
    start = 0
    for adapters, items in groupby(ordered, lambda item: item.sequence.adapters):
        stop = start + sum(item.num_tokens for item in items)
        if adapters:
            rows.append(AdapterRows(start, stop, adapters))
        start = stop
    return rows
