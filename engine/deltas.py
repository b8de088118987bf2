"""Adapters on top of a decoder that does not know them: what they can change, wrapped.

Rows of a step are sorted by adapter, so that each adapter's rows are one slice. A wrapped layer
computes the base's result for all rows at once and then applies each adapter's deltas to its slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from polydelta.engine.linear_deltas import LinearDeltas
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.layers import Norm
from polydelta.engine.pool_adapter import PoolAdapter
from polydelta.kernels.ops import Linear


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


@dataclass(eq=False)
class StepDeltas:
    """What the wrapped layers apply in the step at hand; rows of the bare base are in none."""

    segments: Sequence[AdapterSegment] = field(default_factory=tuple)
    # The same of the rows whose logits are computed, counted among these.
    sample_segments: Sequence[AdapterSegment] = field(default_factory=tuple)


def wrap_decoder(decoder: Decoder, deltas: StepDeltas) -> None:
    """Puts the deltas of each step on top of whatever in the decoder an adapter can change."""
    for layer, block in enumerate(decoder.layers):
        block.wrap_linears(partial(_linear, deltas, layer))
        block.wrap_norms(partial(_norm, deltas, layer))
    decoder.embed = _embedding(deltas, decoder.embed)
    decoder.norm = _final_norm(deltas, decoder.norm)
    decoder.lm_head = _head(deltas, decoder.lm_head)


def _linear(deltas: StepDeltas, layer: int, index: int, linear: Linear) -> Linear:
    def wrapped(x: Tensor) -> Tensor:
        active = [
            (segment, changes)
            for segment in deltas.segments
            if (changes := segment.adapter.linear(layer, index)) is not None
        ]
        y = linear(_scaled(x, active))
        for segment, changes in active:
            changes.apply(y[segment.rows], x[segment.rows], segment.weight, linear)
        return y

    return wrapped


def _scaled(x: Tensor, active: Sequence[tuple[AdapterSegment, LinearDeltas]]) -> Tensor:
    """The base's input: x itself where no adapter scales it."""
    scaled = x
    for segment, changes in active:
        if changes.input_scale is not None:
            scaled = x.clone() if scaled is x else scaled
            scaled[segment.rows] *= changes.input_scale
    return scaled


def _norm(deltas: StepDeltas, layer: int, index: int, norm: Norm) -> Norm:
    def wrapped(x: Tensor, weight: Tensor | None = None) -> Tensor:
        y = norm(x, weight)
        for segment in deltas.segments:
            own = segment.adapter.norm(layer, index)
            if own is not None:
                y[segment.rows] = norm(x[segment.rows], own)
        return y

    return wrapped


def _final_norm(deltas: StepDeltas, norm: Norm) -> Norm:
    def wrapped(x: Tensor, weight: Tensor | None = None) -> Tensor:
        y = norm(x, weight)
        for segment in deltas.sample_segments:
            own = segment.adapter.final_norm
            if own is not None:
                y[segment.rows] = norm(x[segment.rows], own)
        return y

    return wrapped


def _embedding(deltas: StepDeltas, embed: Linear) -> Linear:
    def wrapped(tokens: Tensor) -> Tensor:
        embedded = embed(tokens)
        for segment in deltas.segments:
            changes = segment.adapter.embedding
            if changes is not None:
                changes.apply(embedded[segment.rows], tokens[segment.rows], segment.weight)
        return embedded

    return wrapped


def _head(deltas: StepDeltas, head: Linear) -> Linear:
    def wrapped(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        for segment in deltas.sample_segments:
            changes = segment.adapter.head
            if changes is not None:
                rows = segment.rows
                changes.apply(logits[rows], hidden[rows], segment.weight, head)
        return logits

    return wrapped
