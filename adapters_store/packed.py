"""The form in which an adapter lies in the pool: one run of bytes for each decoder layer.

For a fused linear with parts q, k and v the bytes of its low-rank and sparse deltas are, each row
padded to ALIGNMENT:

    A of q | A of k | A of v      one matrix [sum of ranks, in], so one shrink serves all parts
    B of q, transposed            [rank of q, out of q]
    B of k, transposed            ...
    row pointers, columns, values of the entries of all parts, as one CSR over the fused rows

Other kinds lie as `packed_deltas.py` says. What changes the embedding or the head is cut over the
layers, because a page exists in every one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.packed_deltas import PackedDelta, PackedLowRank, PackedSparse
from polydelta.adapters_store.traits import AdapterTraits


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """All deltas of one decoder layer; empty when it has none."""

    # [nbytes] uint8, contiguous, a multiple of ALIGNMENT
    data: Tensor
    deltas: tuple[PackedDelta, ...]


@dataclass(frozen=True, eq=False)
class PackedPrefix:
    """What virtual tokens before the sequence are made of. It goes into pages of the KV cache's
    form, not among the layers' bytes."""

    # Keys and values [layers, 2, n, kv_heads, head_dim], or embeddings [n, hidden], whose keys and
    # values are computed once the adapter is in the pool; the adapter's dtype
    values: Tensor

    @property
    def embedded(self) -> bool:
        """Whether these are embeddings."""
        return self.values.dim() == 2

    @property
    def num_tokens(self) -> int:
        return self.values.shape[0 if self.embedded else 2]


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter, ready to be copied into pages."""

    # sha256 of the content that it was made from.
    digest: str
    # Of matrices and of sparse values.
    dtype: torch.dtype
    # One for each decoder layer of the base.
    layers: tuple[PackedLayer, ...]
    prefix: PackedPrefix | None = None
    # Tokens from which on it acts; empty: from the first one.
    invocation: tuple[int, ...] = ()

    @property
    def traits(self) -> AdapterTraits:
        prefix = self.prefix
        return AdapterTraits(0 if prefix is None else prefix.num_tokens, self.invocation)

    @property
    def bytes_per_layer(self) -> int:
        """Of the largest layer: a page exists in every layer, so it sets the number of pages."""
        return max((layer.data.numel() for layer in self.layers), default=0)

    @property
    def nbytes(self) -> int:
        prefix = 0 if self.prefix is None else self.prefix.values.nbytes
        return sum(layer.data.numel() for layer in self.layers) + prefix

    @property
    def fusable(self) -> bool:
        """Whether it is nothing but changes of the linear layers' weights that can go into them."""
        deltas = (delta for layer in self.layers for delta in layer.deltas)
        plain = all(isinstance(delta, PackedLowRank | PackedSparse) for delta in deltas)
        return plain and self.traits == AdapterTraits()
