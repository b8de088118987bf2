"""Deltas of a given size with small random numbers, of every kind: stand-ins for trained ones where
only their size counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import (
    Bias,
    Circulant,
    Columns,
    Delta,
    Dense,
    Invocation,
    Kronecker,
    LowRank,
    NormWeight,
    OneBit,
    Prefix,
    Prompt,
    Rotate,
    Rows,
    Scale,
    Side,
    Sparse,
    TokenRows,
    TopK,
)

# A whole number, or a share of all that there are.
Amount = int | float

_SMALL = 0.01


@dataclass(frozen=True, eq=False)
class Place:
    """A module of a base, and what the numbers of its deltas are drawn from."""

    layout: BaseLayout
    module: str
    generator: torch.Generator

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of a linear layer."""
        return self.layout.target_shapes[self.module]

    def numbers(self, *shape: int) -> Tensor:
        """Normally distributed around 0, float32."""
        return _SMALL * torch.randn(shape, generator=self.generator)

    def choose(self, amount: Amount, total: int) -> Tensor:
        """Of the numbers below total, one from each of n equal ranges: `[n]` int64, ascending."""
        count = min(amount if isinstance(amount, int) else max(1, int(amount * total)), total)
        bounds = torch.arange(count + 1) * total // count
        within = torch.rand(count, generator=self.generator, dtype=torch.float64)
        return bounds[:-1] + (within * bounds.diff()).long()


Make = Callable[[Place], Delta]


def low_rank(rank: int) -> Make:
    def make(place: Place) -> LowRank:
        out_features, in_features = place.shape
        return LowRank(place.numbers(rank, in_features), place.numbers(out_features, rank))

    return make


def sparse(entries: Amount) -> Make:
    return lambda place: _sparse(place, entries)


def sparse_as_low_rank(rank: int) -> Make:
    """With as many entries as a LowRank of this rank."""
    return lambda place: _sparse(place, rank * sum(place.shape))


def _sparse(place: Place, entries: Amount) -> Sparse:
    out_features, in_features = place.shape
    places = place.choose(entries, out_features * in_features)
    row_pointers = torch.zeros(out_features + 1, dtype=torch.int32)
    row_pointers[1:] = (places // in_features).bincount(minlength=out_features).cumsum(0)
    columns = (places % in_features).to(torch.int32)
    return Sparse(place.shape, row_pointers, columns, place.numbers(len(places)))


def columns(count: Amount) -> Make:
    def make(place: Place) -> Columns:
        out_features, in_features = place.shape
        indices = place.choose(count, in_features).to(torch.int32)
        return Columns(in_features, indices, place.numbers(out_features, len(indices)))

    return make


def rows(count: Amount) -> Make:
    def make(place: Place) -> Rows:
        out_features, in_features = place.shape
        indices = place.choose(count, out_features).to(torch.int32)
        return Rows(out_features, indices, place.numbers(len(indices), in_features))

    return make


def one_bit(place: Place) -> OneBit:
    out_features, in_features = place.shape
    size = (out_features, -(-in_features // 8))
    bits = torch.randint(256, size, generator=place.generator, dtype=torch.uint8)
    return OneBit(in_features, bits, _SMALL)


def kronecker(place: Place) -> Kronecker:
    """The smaller factors on the left, each as near to a square root as it can be."""
    out_features, in_features = place.shape
    a, b = _near_root(out_features), _near_root(in_features)
    return Kronecker(place.numbers(a, b), place.numbers(out_features // a, in_features // b))


def _near_root(number: int) -> int:
    """The largest divisor that is no larger than the square root."""
    return next(d for d in range(math.isqrt(number), 0, -1) if number % d == 0)


def circulant(block_size: int) -> Make:
    """In the largest blocks that divide this size and the layer."""

    def make(place: Place) -> Circulant:
        out_features, in_features = place.shape
        size = math.gcd(block_size, out_features, in_features)
        return Circulant(place.numbers(out_features // size, in_features // size, size))

    return make


def top_k(rank: int, keep: int) -> Make:
    def make(place: Place) -> TopK:
        out_features, in_features = place.shape
        a, b = place.numbers(rank, in_features), place.numbers(out_features, rank)
        return TopK(a, b, place.numbers(rank), keep)

    return make


def output_scale(place: Place) -> Scale:
    return Scale(1 + place.numbers(place.shape[0]), Side.OUTPUT)


def input_scale(place: Place) -> Scale:
    return Scale(1 + place.numbers(place.shape[1]), Side.INPUT)


def rotate(group_size: int) -> Make:
    """Each output with the one half a group away; groups as in `circulant`."""

    def make(place: Place) -> Rotate:
        size = place.shape[0]
        half = math.gcd(group_size, size) // 2
        partner = torch.arange(size, dtype=torch.int32).view(-1, 2, half).flip(1).flatten()
        return Rotate(1 + place.numbers(size), place.numbers(size), partner)

    return make


def bias(place: Place) -> Bias:
    return Bias(place.numbers(place.shape[0]))


def norm_weight(place: Place) -> NormWeight:
    return NormWeight(1 + place.numbers(place.layout.norm_sizes[place.module]))


def token_rows(count: int) -> Make:
    def make(place: Place) -> TokenRows:
        ids = place.choose(count, place.layout.vocab_size)
        return TokenRows(ids, place.numbers(len(ids), place.layout.hidden_size))

    return make


def prefix(num_tokens: int) -> Make:
    def make(place: Place) -> Prefix:
        base = place.layout
        size = (base.num_layers, 2, num_tokens, base.num_kv_heads, base.head_dim)
        return Prefix(place.numbers(*size))

    return make


def prompt(num_tokens: int) -> Make:
    return lambda place: Prompt(place.numbers(num_tokens, place.layout.hidden_size))


def invocation(num_tokens: int) -> Make:
    return lambda place: Invocation(
        tuple(place.choose(num_tokens, place.layout.vocab_size).tolist())
    )


def dense(place: Place) -> Dense:
    return Dense(place.numbers(*place.shape))
