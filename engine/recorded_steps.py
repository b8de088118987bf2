"""Decode steps that are recorded once for each number of rows and replayed afterwards.

A step of few rows has some hundred operations of some microseconds each: without Python between
them, one row takes 7 ms instead of 10 on a 2-core Zen 5. A recording serves any mix of adapters
that change nothing but linear layers, and any lengths.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from polydelta.engine.batch import Batch
from polydelta.engine.deltas import StepDeltas
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.paged_kv import PagedKV
from polydelta.kernels.ops import Kernels, RecordedStep

# Kept at a time; the one that was not used for the longest goes. A GPU has 23 sizes, each with and
# without adapters, of the kind of attention that the server's own selection asks for; those that
# requests ask for besides take the places of sizes that are seldom seen.
MOST_RECORDINGS = 48

# Rows, whether any adapter acts on them, and whether attention is the plain one.
Shape = tuple[int, bool, bool]


class RecordedSteps:
    """Computes decode steps, by a recording where there is one; for one thread."""

    def __init__(self, decoder: Decoder, kv: PagedKV, deltas: StepDeltas, kernels: Kernels) -> None:
        """deltas: what is wrapped around the decoder's layers."""
        self._decoder = decoder
        self._kv = kv
        self._deltas = deltas
        self._kernels = kernels
        # None where a step of the shape cannot be recorded.
        self._recordings: OrderedDict[Shape, RecordedStep | None] = OrderedDict()

    def padded(self, batch: Batch) -> Batch:
        """The batch with as many rows as it is recorded with, where it may be recorded."""
        rows = self._kernels.recorded_rows(len(batch.tokens)) if batch.decodes_only else None
        return batch if rows is None else batch.padded(rows)

    def compute(self, batch: Batch) -> Tensor | None:
        """Logits `[samples, vocab]` of a step that is `padded` and prepared; None where it is not
        one that can be recorded. The next step overwrites them."""
        logits = self._compute(batch)
        return None if logits is None else logits[: len(batch.sample_rows)]

    def _compute(self, batch: Batch) -> Tensor | None:
        """Of all rows, those that were added too."""
        rows = len(batch.tokens)
        if not batch.decodes_only or self._kernels.recorded_rows(rows) != rows:
            return None
        if not self._deltas.only_outputs:
            return None
        group = self._deltas.group
        if group is not None and not group.recordable:
            return None
        # What a page's end asks for, is not asked for in every step.
        if not self._kv.recordable:
            return None
        inputs = [batch.tokens, batch.positions, batch.slots, *self._kv.plans]
        if group is not None:
            inputs.append(group)
        shape = rows, group is not None, self._kv.is_plain
        if shape not in self._recordings:
            return self._record(shape, batch, inputs)
        self._recordings.move_to_end(shape)
        recording = self._recordings[shape]
        return None if recording is None else recording.replay(inputs)

    def forget(self) -> None:
        """To be called when weights have moved."""
        self._recordings.clear()

    def _record(self, shape: Shape, batch: Batch, inputs: list[object]) -> Tensor:
        def run() -> Tensor:
            hidden = self._decoder.hidden_states(batch.tokens, batch.positions, self._kv)
            return self._decoder.logits(hidden)

        logits, self._recordings[shape] = self._kernels.record(inputs, run)
        if len(self._recordings) > MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        return logits
