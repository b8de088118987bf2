"""What adapters do to the embedding and to the head, from pieces in every layer's pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
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
from polydelta.adapters_store.merged_model import MergedModel
from polydelta.adapters_store.packing import pack
from polydelta.engine.pool_adapter import PoolAdapter
from polydelta.engine.token_deltas import ReplacedRows, TokenMatrix
from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.ops import Kernels
from polydelta.kernels.reference import ReferenceKernels

# Enough tokens for several pieces of everything.
VOCAB, HIDDEN, LAYERS = 9001, 37, 5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
KERNELS = pytest.mark.parametrize("kernels", [ReferenceKernels(), CpuKernels()], ids=["ref", "cpu"])
PLACES = pytest.mark.parametrize("scattered", [False, True], ids=["in one run", "scattered"])
# Of the largest number.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class BaseWeights:
    """Of the embedding and the head."""

    embedding: Tensor
    head: Tensor

    def read(self, name: str) -> Tensor:
        norm = torch.ones(HIDDEN)
        parts = {EMBEDDING: self.embedding, HEAD: self.head, FINAL_NORM: norm}
        return parts[name.removesuffix(".weight")]


@pytest.fixture(scope="module")
def weights() -> BaseWeights:
    torch.manual_seed(1)
    return BaseWeights(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5)


@pytest.fixture(scope="module")
def layout(weights: BaseWeights) -> BaseLayout:
    return BaseLayout("tokens", LAYERS, (), hidden_size=HIDDEN, vocab_size=VOCAB, weights=weights)


def low_rank(shape: tuple[int, int], rank: int) -> LowRank:
    return LowRank(torch.randn(rank, shape[1]) / shape[1] ** 0.5, torch.randn(shape[0], rank))


def token_rows(*ids: int) -> TokenRows:
    return TokenRows(torch.tensor(ids), torch.randn(len(ids), HIDDEN))


def in_pool(
    modules: Mapping[str, tuple[Delta, ...]],
    layout: BaseLayout,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels | None = None,
    scattered: bool = False,
) -> PoolAdapter:
    """In pages of an odd size, of a pool that is full of junk."""
    packed = pack(Adapter("id", 1, "", "TEST", modules), layout, dtype)
    page_bytes = 5 * 64
    count = -(-packed.bytes_per_layer // page_bytes)
    storage = torch.full((LAYERS, 2 * count + 3, page_bytes), 0xAB, dtype=torch.uint8)
    pages = torch.randperm(2 * count + 3)[:count].tolist() if scattered else range(2, count + 2)
    return PoolAdapter(packed, storage, list(pages), kernels or CpuKernels())


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype
    error = (got.float() - want).abs().max()
    assert error <= TOLERANCE[dtype] * want.abs().max()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 20),
    st.lists(st.integers(0, 59), max_size=30),
)
def test_rows_of_a_matrix_in_pieces_are_those_of_the_whole(
    count: int, size: int, places: list[int]
) -> None:
    whole = torch.randn(count, 3)
    matrix = TokenMatrix(whole.split(size))
    wanted = torch.tensor([place % count for place in places], dtype=torch.int64)
    assert torch.equal(matrix.rows(wanted), whole[wanted])


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.integers(0, 40), min_size=1),
    st.integers(1, 9),
    st.lists(st.integers(0, 45), max_size=30),
)
def test_tokens_with_rows_are_found_among_others_however_often_they_occur(
    ids: set[int], size: int, tokens: list[int]
) -> None:
    ordered = sorted(ids)
    # A token's row says which token it is.
    matrix = TokenMatrix(torch.tensor(ordered).float().unsqueeze(1).repeat(1, 2).split(size))
    found, rows = ReplacedRows(torch.tensor(ordered), matrix).find(
        torch.tensor(tokens, dtype=torch.int64)
    )
    assert found.tolist() == [place for place, token in enumerate(tokens) if token in ids]
    assert rows.tolist() == [[token, token] for token in tokens if token in ids]


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([], []),
        ([0, 4, 10, 99], []),
        ([3, 9, 5], [0, 1, 2]),
        ([9, 9, 0, 9], [0, 1, 3]),
        ([99, 3], [1]),
    ],
    ids=["no tokens", "none found", "all found", "again and again", "beyond the last"],
)
def test_finding_rows_of_some_tokens(tokens: list[int], found: list[int]) -> None:
    rows = ReplacedRows(torch.tensor([3, 5, 9]), TokenMatrix(torch.randn(3, 4).split(2)))
    places, values = rows.find(torch.tensor(tokens, dtype=torch.int64))
    assert places.tolist() == found
    assert values.shape == (len(found), 4)


OF_EMBEDDING, OF_HEAD = (HIDDEN, VOCAB), (VOCAB, HIDDEN)
# What an adapter makes of the embedding and of the head, some in several pieces.
CASES: dict[str, tuple[list[Delta], list[Delta]]] = {
    "low rank": ([low_rank(OF_EMBEDDING, 3)], [low_rank(OF_HEAD, 3)]),
    "twice low rank": (
        [low_rank(OF_EMBEDDING, 5), low_rank(OF_EMBEDDING, 2)],
        [low_rank(OF_HEAD, 1), low_rank(OF_HEAD, 19)],
    ),
    "a few rows": ([token_rows(0, 7, 8, 9000)], [token_rows(0, 7, 8, 9000)]),
    "many rows": ([token_rows(*range(5, 9001, 3))], [token_rows(*range(VOCAB))]),
    "scale and bias": (
        [Scale(torch.randn(HIDDEN), Side.OUTPUT), Bias(torch.randn(HIDDEN))],
        [Scale(torch.randn(VOCAB), Side.OUTPUT), Bias(torch.randn(VOCAB))],
    ),
    # Rows are the base's before anything else is done to it: that is how PEFT trains over an
    # embedding of its own.
    "everything, on top of rows": (
        [
            Bias(torch.randn(HIDDEN)),
            low_rank(OF_EMBEDDING, 4),
            Scale(torch.randn(HIDDEN), Side.OUTPUT),
            token_rows(*range(1, 9001, 2)),
        ],
        [
            low_rank(OF_HEAD, 4),
            token_rows(*range(1, 9001, 2)),
            Bias(torch.randn(VOCAB)),
            Scale(torch.randn(VOCAB), Side.OUTPUT),
        ],
    ),
}


@PLACES
@DTYPES
@KERNELS
@pytest.mark.parametrize("case", CASES)
def test_embedding_and_head_give_what_the_merged_model_gives(
    layout: BaseLayout,
    weights: BaseWeights,
    case: str,
    kernels: Kernels,
    dtype: torch.dtype,
    scattered: bool,
) -> None:
    torch.manual_seed(2)
    of_embedding, of_head = CASES[case]
    modules = {EMBEDDING: tuple(of_embedding), HEAD: tuple(of_head)}
    merged = dict(MergedModel(Adapter("id", 1, "", "TEST", modules), layout).tensors())
    bound = in_pool(modules, layout, dtype, kernels, scattered)
    # Rows of a step, of which the adapter's are a part.
    tokens = torch.cat((torch.randint(VOCAB, (40,)), torch.tensor([0, 9000, 7, 7, 8])))
    mine = slice(3, 44)

    embedded = F.embedding(tokens, weights.embedding).to(dtype)
    before = embedded.clone()
    assert bound.embedding is not None
    bound.embedding.apply(embedded[mine], tokens[mine], 1.0)
    want = F.embedding(tokens, merged[f"{EMBEDDING}.weight"])
    near(embedded[mine], want[mine], dtype)
    assert not torch.equal(embedded[mine], before[mine])
    assert torch.equal(embedded[:3], before[:3])
    assert torch.equal(embedded[44:], before[44:])

    hidden = torch.randn(9, HIDDEN)
    base = kernels.linear(weights.head.to(dtype), None)
    logits = base(hidden.to(dtype))
    before, mine = logits.clone(), slice(2, 8)
    assert bound.head is not None
    bound.head.apply(logits[mine], hidden.to(dtype)[mine], 1.0, base)
    want = F.linear(hidden, merged[f"{HEAD}.weight"], merged.get(f"{HEAD}.bias"))
    near(logits[mine], want[mine], dtype)
    assert not torch.equal(logits[mine], before[mine])
    assert torch.equal(logits[:2], before[:2])
    assert torch.equal(logits[8:], before[8:])


@PLACES
@DTYPES
@KERNELS
@pytest.mark.parametrize("weight", [0.25, -3.0])
def test_in_a_sum_what_is_added_has_the_adapters_weight(
    layout: BaseLayout,
    weights: BaseWeights,
    weight: float,
    kernels: Kernels,
    dtype: torch.dtype,
    scattered: bool,
) -> None:
    torch.manual_seed(3)
    modules: dict[str, tuple[Delta, ...]] = {
        EMBEDDING: (low_rank(OF_EMBEDDING, 3), Bias(torch.randn(HIDDEN))),
        HEAD: (Bias(torch.randn(VOCAB)), low_rank(OF_HEAD, 3)),
    }
    merged = dict(MergedModel(Adapter("id", 1, "", "TEST", modules), layout).tensors())
    bound = in_pool(modules, layout, dtype, kernels, scattered)
    assert bound.embedding is not None
    assert bound.head is not None

    tokens = torch.randint(VOCAB, (23,))
    embedded = F.embedding(tokens, weights.embedding)
    change = F.embedding(tokens, merged[f"{EMBEDDING}.weight"]) - embedded
    got = embedded.to(dtype, copy=True)
    bound.embedding.apply(got, tokens, weight)
    near(got, embedded + weight * change, dtype)

    hidden, base = torch.randn(6, HIDDEN), kernels.linear(weights.head.to(dtype), None)
    logits = F.linear(hidden, weights.head)
    change = F.linear(hidden, merged[f"{HEAD}.weight"], merged[f"{HEAD}.bias"]) - logits
    got = base(hidden.to(dtype))
    bound.head.apply(got, hidden.to(dtype), weight, base)
    near(got, logits + weight * change, dtype)


def test_what_an_adapter_does_not_change_stays_bit_for_bit(layout: BaseLayout) -> None:
    tokens, logits = torch.randint(VOCAB, (9,)), torch.randn(9, VOCAB)
    embedded, hidden = torch.randn(2, 9, HIDDEN)
    for module, deltas in ((HEAD, CASES["low rank"][1]), (EMBEDDING, CASES["low rank"][0])):
        bound = in_pool({module: tuple(deltas)}, layout)
        assert bound.embedding is not None
        assert bound.head is not None
        if module == HEAD:
            got = embedded.clone()
            bound.embedding.apply(got, tokens, 1.0)
            assert torch.equal(got, embedded)
        else:
            got = logits.clone()
            bound.head.apply(got, hidden, 1.0, lambda x: x)
            assert torch.equal(got, logits)


@PLACES
def test_an_adapter_of_other_modules_has_nothing_for_embedding_and_head(
    layout: BaseLayout, scattered: bool
) -> None:
    for modules in ({FINAL_NORM: (NormWeight(torch.randn(HIDDEN)),)}, {}):
        bound = in_pool(modules, layout, scattered=scattered)
        assert bound.embedding is None
        assert bound.head is None
