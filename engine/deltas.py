"""Adapters on top of a decoder that does not know them: what they can change, wrapped.

Rows of a step are sorted by adapter, so that each adapter's rows are one slice. A wrapped layer
computes the base's result for all rows at once; what adapters change comes on top of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from polydelta.engine.linear_deltas import LinearDeltas
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.layers import Norm
from polydelta.engine.pool_adapter import PoolAdapter, linear_site
from polydelta.kernels.delta_groups import DeltaGroup, DeltaSegment, Linear
from polydelta.kernels.ops import Kernels


@dataclass(frozen=True, eq=False)
class AdapterSegment:
    """Rows of a step that an adapter is applied to: start : stop. Those of a sum of adapters are in
    one segment for each."""

    start: int
    stop: int
    adapter: PoolAdapter
    weight: float = 1.0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class StepDeltas:
    """What the wrapped layers apply in the step at hand; rows of the bare base are in no segment.

    Most adapters change nothing but outputs of linear layers, and these go in one group: where
    nobody does anything else, no layer looks through the segments.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.begin(())

    def begin(
        self, segments: Sequence[AdapterSegment], sample_segments: Sequence[AdapterSegment] = ()
    ) -> None:
        """sample_segments: the same of the rows whose logits are computed, counted among these."""
        self.group = self._grouped(segments) if segments else None
        self.input_scaling = [s for s in segments if s.adapter.scales_inputs]
        self.norms = [s for s in segments if s.adapter.changes_norms]
        self.embeddings = [s for s in segments if s.adapter.changes_tokens]
        self.final_norms = [s for s in sample_segments if s.adapter.changes_norms]
        self.heads = [s for s in sample_segments if s.adapter.changes_tokens]

    @property
    def only_outputs(self) -> bool:
        """Whether nothing but outputs of linear layers is changed."""
        return not (
            self.input_scaling or self.norms or self.embeddings or self.final_norms or self.heads
        )

    def _grouped(self, segments: Sequence[AdapterSegment]) -> DeltaGroup:
        return self._kernels.group_deltas(
            [DeltaSegment(s.start, s.stop, s.adapter.sites, s.weight) for s in segments]
        )


def wrap_decoder(decoder: Decoder, deltas: StepDeltas) -> None:
    """Puts the deltas of each step on top of whatever in the decoder an adapter can change."""
    for layer, block in enumerate(decoder.layers):
        block.wrap_linears(partial(_linear, deltas, layer))
        block.wrap_norms(partial(_norm, deltas, layer))
    decoder.embed = _embedding(deltas, decoder.embed)
    decoder.norm = _final_norm(deltas, decoder.norm)
    decoder.lm_head = _head(deltas, decoder.lm_head)


def _linear(deltas: StepDeltas, layer: int, index: int, linear: Linear) -> Linear:
    site = linear_site(layer, index)

    def wrapped(x: Tensor) -> Tensor:
        if deltas.group is None:
            return linear(x)
        if not deltas.input_scaling:
            return deltas.group.multiply(site, linear, x)
        each = [(s, s.adapter.linear(layer, index)) for s in deltas.input_scaling]
        scaling = [(s, changes) for s, changes in each if changes and changes.scales_input]
        y = linear(_scaled(x, scaling))
        for segment, changes in scaling:
            changes.scale_parts(y[segment.rows], x[segment.rows], linear)
        deltas.group.apply(site, y, x)
        return y

    return wrapped


def _scaled(x: Tensor, scaling: Sequence[tuple[AdapterSegment, LinearDeltas]]) -> Tensor:
    """The base's input: x itself where no adapter scales it."""
    scaled = x
    for segment, changes in scaling:
        if changes.input_scale is not None:
            scaled = x.clone() if scaled is x else scaled
            scaled[segment.rows] *= changes.input_scale
    return scaled


def _norm(deltas: StepDeltas, layer: int, index: int, norm: Norm) -> Norm:
    def wrapped(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        y = norm(x, weight, residual)
        for segment in deltas.norms:
            own = segment.adapter.norm(layer, index)
            if own is not None:
                y[segment.rows] = norm(x[segment.rows], own)
        return y

    return wrapped


def _final_norm(deltas: StepDeltas, norm: Norm) -> Norm:
    def wrapped(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        y = norm(x, weight, residual)
        for segment in deltas.final_norms:
            own = segment.adapter.final_norm
            if own is not None:
                y[segment.rows] = norm(x[segment.rows], own)
        return y

    return wrapped


def _embedding(deltas: StepDeltas, embed: Linear) -> Linear:
    def wrapped(tokens: Tensor) -> Tensor:
        embedded = embed(tokens)
        for segment in deltas.embeddings:
            changes = segment.adapter.embedding
            if changes is not None:
                changes.apply(embedded[segment.rows], tokens[segment.rows], segment.weight)
        return embedded

    return wrapped


def _head(deltas: StepDeltas, head: Linear) -> Linear:
    def wrapped(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        for segment in deltas.heads:
            changes = segment.adapter.head
            if changes is not None:
                rows = segment.rows
                own = logits[rows].to(hidden.dtype)
                changes.apply(own, hidden[rows], segment.weight, head)
                logits[rows] = own.float()
        return logits

    return wrapped
