"""What has a row for each token, cut over the layers of the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, FINAL_NORM, HEAD, BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    LowRank,
    NormWeight,
    Scale,
    Side,
    TokenRows,
)
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packed_deltas import (
    EMBEDDING_LINEAR,
    FINAL_NORM_INDEX,
    HEAD_LINEAR,
    PackedBias,
    PackedDelta,
    PackedHeadExpand,
    PackedHeadShrink,
    PackedNorm,
    PackedScale,
    PackedTokenExpand,
    PackedTokenRows,
    PackedTokenShrink,
)
from polydelta.adapters_store.packed_tensors import matrix_view, vector_view
from polydelta.adapters_store.packing import pack

P = TypeVar("P", bound=PackedDelta)
LAYERS = (1, 3, 30)
DTYPES = st.sampled_from((torch.float32, torch.bfloat16))


@st.composite
def bases(draw: st.DrawFn) -> BaseLayout:
    """Without layers that tell: vocabularies with and without room for a piece in each layer."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    vocab = draw(st.sampled_from((1, 2, 29, 401, 4099, 30011)))
    hidden, layers = draw(st.integers(1, 40)), draw(st.sampled_from(LAYERS))
    return BaseLayout("tokens", layers, (), hidden_size=hidden, vocab_size=vocab)


def packed_of(
    layout: BaseLayout, module: str, *deltas: Delta, dtype: torch.dtype = torch.float32
) -> PackedAdapter:
    return pack(Adapter("id", 1, "", "TEST", {module: deltas}), layout, dtype)


def found(packed: PackedAdapter, kind: type[P]) -> Iterator[tuple[int, P, Tensor]]:
    """With the layer that it lies in, and that layer's bytes."""
    for number, layer in enumerate(packed.layers):
        for delta in layer.deltas:
            if isinstance(delta, kind):
                yield number, delta, layer.data


def check_cut(sizes: list[int], layers: list[int]) -> None:
    """One piece in each of the first layers, of one size but for the last, which is not longer."""
    assert layers == list(range(len(sizes)))
    assert set(sizes[:-1]) <= {sizes[0]}
    assert 0 < sizes[-1] <= sizes[0]


def low_rank(shape: tuple[int, int], rank: int) -> LowRank:
    return LowRank(torch.randn(rank, shape[1]), torch.randn(shape[0], rank))


@settings(max_examples=60, deadline=None)
@given(bases(), st.lists(st.integers(1, 40), min_size=1, max_size=2), DTYPES)
def test_a_low_rank_delta_of_the_embedding_is_all_there_token_by_token(
    layout: BaseLayout, ranks: list[int], dtype: torch.dtype
) -> None:
    deltas = [low_rank(layout.target_shapes[EMBEDDING], rank) for rank in ranks]
    packed = packed_of(layout, EMBEDDING, *deltas, dtype=dtype)
    layers, pieces = [], []
    for layer, delta, data in found(packed, PackedTokenShrink):
        assert delta.first_id == sum(map(len, pieces))
        layers.append(layer)
        pieces.append(matrix_view(data, delta.a_t, dtype))
    check_cut([len(piece) for piece in pieces], layers)
    assert torch.equal(torch.cat(pieces), torch.cat([d.a.T for d in deltas], 1).to(dtype))
    ((layer, delta, data),) = found(packed, PackedTokenExpand)
    assert layer == 0
    b_t = torch.cat([d.b.T for d in deltas]).to(dtype)
    assert torch.equal(matrix_view(data, delta.b_t, dtype), b_t)


@settings(max_examples=60, deadline=None)
@given(bases(), st.lists(st.integers(1, 40), min_size=1, max_size=2), DTYPES)
def test_a_low_rank_delta_of_the_head_is_all_there_token_by_token(
    layout: BaseLayout, ranks: list[int], dtype: torch.dtype
) -> None:
    deltas = [low_rank(layout.target_shapes[HEAD], rank) for rank in ranks]
    packed = packed_of(layout, HEAD, *deltas, dtype=dtype)
    layers, pieces = [], []
    for layer, delta, data in found(packed, PackedHeadExpand):
        block = delta.block
        b_t = matrix_view(data, block.b_t, dtype)
        assert block.out_start == sum(map(len, pieces))
        assert (block.rank_start, block.rank, block.out_features) == (0, *b_t.shape)
        layers.append(layer)
        pieces.append(b_t.T)
    check_cut([len(piece) for piece in pieces], layers)
    assert torch.equal(torch.cat(pieces), torch.cat([d.b for d in deltas], 1).to(dtype))
    ((layer, delta, data),) = found(packed, PackedHeadShrink)
    assert layer == 0
    a = torch.cat([d.a for d in deltas]).to(dtype)
    assert torch.equal(matrix_view(data, delta.a, dtype), a)


@settings(max_examples=60, deadline=None)
@given(bases(), st.sampled_from((EMBEDDING, HEAD)), st.floats(0, 1), DTYPES)
def test_replaced_rows_are_all_there_in_the_order_of_their_tokens(
    layout: BaseLayout, module: str, share: float, dtype: torch.dtype
) -> None:
    count = round(share * layout.vocab_size)
    ids = torch.randperm(layout.vocab_size)[:count].sort().values
    rows = torch.randn(count, layout.hidden_size)
    packed = packed_of(layout, module, TokenRows(ids, rows), dtype=dtype)
    layers, got_ids, got_rows = [], [], []
    for layer, delta, data in found(packed, PackedTokenRows):
        assert delta.linear == (EMBEDDING_LINEAR if module == EMBEDDING else HEAD_LINEAR)
        layers.append(layer)
        got_ids.append(vector_view(data, delta.ids))
        got_rows.append(matrix_view(data, delta.rows, dtype))
    assert list(map(len, got_ids)) == list(map(len, got_rows))
    if count:
        check_cut([len(piece) for piece in got_ids], layers)
        assert torch.equal(torch.cat(got_ids), ids)
        assert torch.equal(torch.cat(got_rows), rows.to(dtype))
    else:
        assert not layers
        assert packed.nbytes == 0


@settings(max_examples=60, deadline=None)
@given(bases(), DTYPES)
def test_scales_and_biases_of_the_head_are_all_there_in_float32(
    layout: BaseLayout, dtype: torch.dtype
) -> None:
    scale, first, second = torch.randn(3, layout.vocab_size)
    packed = packed_of(
        layout, HEAD, Bias(first), Scale(scale, Side.OUTPUT), Bias(second), dtype=dtype
    )
    scales: list[Tensor] = []
    for layer, delta, data in found(packed, PackedScale):
        assert (delta.linear, delta.out_start) == (HEAD_LINEAR, sum(map(len, scales)))
        assert layer == len(scales)
        scales.append(vector_view(data, delta.vector))
    check_cut(list(map(len, scales)), list(range(len(scales))))
    assert torch.equal(torch.cat(scales), scale)
    total = torch.zeros(layout.vocab_size)
    for _, delta, data in found(packed, PackedBias):
        vector = vector_view(data, delta.vector)
        assert delta.linear == HEAD_LINEAR
        total[delta.out_start : delta.out_start + len(vector)] += vector
    assert torch.equal(total, first + second)


@pytest.mark.parametrize("layers", LAYERS)
def test_what_is_as_long_as_a_token_is_in_the_first_layer(layers: int) -> None:
    layout = BaseLayout("tokens", layers, (), hidden_size=37, vocab_size=30011)
    scale, bias, norm = torch.randn(3, 37)
    of_embedding = (Scale(scale, Side.OUTPUT), Bias(bias))
    modules = {EMBEDDING: of_embedding, FINAL_NORM: (NormWeight(norm),)}
    packed = pack(Adapter("id", 1, "", "TEST", modules), layout, torch.bfloat16)
    first, *others = packed.layers
    assert not any(layer.deltas for layer in others)
    of_norm, scaled, shifted = first.deltas
    assert isinstance(of_norm, PackedNorm)
    assert of_norm.norm == FINAL_NORM_INDEX
    assert torch.equal(vector_view(first.data, of_norm.weight), norm.bfloat16())
    assert isinstance(scaled, PackedScale)
    assert isinstance(shifted, PackedBias)
    for delta, vector in ((scaled, scale), (shifted, bias)):
        assert (delta.linear, delta.out_start) == (EMBEDDING_LINEAR, 0)
        assert torch.equal(vector_view(first.data, delta.vector), vector)


VOCAB = 49157
SHAPE = (VOCAB, 61)
# By name: the module, its deltas, and the bytes that they may be more in one layer than in the
# mean: what only the first layer has, and one token of every tensor that is cut (for the head's
# expansion, whose rows are ranks, what fills each up). float32; rows of 61 numbers take 256 bytes.
LARGE: dict[str, tuple[str, Callable[[], tuple[Delta, ...]], int]] = {
    "a low-rank embedding": (EMBEDDING, lambda: (low_rank((61, VOCAB), 16),), 16 * 256 + 64),
    "a low-rank head": (HEAD, lambda: (low_rank(SHAPE, 16),), 16 * 256 + 16 * 64),
    "all rows": (HEAD, lambda: (TokenRows(torch.arange(VOCAB), torch.randn(SHAPE)),), 256 + 64),
    "a scale and a bias": (
        HEAD,
        lambda: (Scale(torch.randn(VOCAB), Side.OUTPUT), Bias(torch.randn(VOCAB))),
        # Too short to be cut to the end: some layers have 16 KiB of each, and others nothing.
        2 * 16384,
    ),
}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_takes_about_the_same_in_every_layer(name: str, layers: int) -> None:
    """A page is one of every layer, so that the largest decides what the adapter costs."""
    module, deltas, more = LARGE[name]
    layout = BaseLayout("tokens", layers, (), hidden_size=61, vocab_size=VOCAB)
    packed = packed_of(layout, module, *deltas())
    mean = packed.nbytes / layers
    assert mean <= packed.bytes_per_layer <= mean + more


def test_what_is_small_is_not_cut() -> None:
    layout = BaseLayout("tokens", 30, (), hidden_size=64, vocab_size=VOCAB)
    rows = TokenRows(torch.arange(64), torch.randn(64, 64))
    packed = packed_of(layout, EMBEDDING, rows)
    assert [len(layer.deltas) for layer in packed.layers] == [1] + 29 * [0]
