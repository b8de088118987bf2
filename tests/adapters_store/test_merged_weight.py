from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from polydelta.adapters_store.delta import (
    Bias,
    Delta,
    Invocation,
    LowRank,
    Matrix,
    NormWeight,
    Prefix,
    Prompt,
    Rotate,
    Scale,
    Side,
    TokenRows,
)
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.merged_weight import merge_into

Makers = Mapping[str, Callable[[tuple[int, int]], Delta]]
MERGED = (
    "low rank", "sparse", "columns", "rows", "one bit", "kronecker", "circulant", "output scale",
    "input scale", "rotate", "bias",
)  # fmt: skip


def unmerged(
    x: Tensor, weight: Tensor, bias: Tensor | None, deltas: list[Delta]
) -> tuple[Tensor, Tensor]:
    """x `[rows, in]` through the layer, by the order in which deltas are applied; and the largest
    number on the way, which sets how near is near enough."""
    scaled = x
    for delta in deltas:
        if isinstance(delta, Scale) and delta.side is Side.INPUT:
            scaled = scaled * delta.vector
    y = F.linear(scaled, weight, bias)
    most = y.abs().max()
    for delta in deltas:
        if isinstance(delta, Scale) and delta.side is Side.OUTPUT:
            y = delta.vector * y
        elif isinstance(delta, Rotate):
            y = delta.cos * y + delta.sin * y[:, delta.partner.long()]
        most = torch.maximum(most, y.abs().max())
    for delta in deltas:
        if isinstance(delta, Matrix):
            added = x @ delta.dense().double().T
            most = torch.maximum(most, added.abs().max())
            y = y + added
    for delta in deltas:
        if isinstance(delta, Bias):
            y = y + delta.vector
    return y, most


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 1000),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.sampled_from(MERGED), max_size=6),
    st.booleans(),
)
def test_the_merged_weight_gives_what_deltas_give_in_their_order(
    delta_makers: Makers, seed: int, shape: tuple[int, int], kinds: list[str], biased: bool
) -> None:
    torch.manual_seed(seed)
    deltas = [delta_makers[kind](shape) for kind in kinds]
    weight = torch.randn(shape, dtype=torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64) if biased else None
    x = torch.randn(3, shape[1], dtype=torch.float64)
    merged, own = merge_into(weight, bias, deltas)
    assert merged.dtype is torch.float64
    want, most = unmerged(x, weight, bias, deltas)
    error = (F.linear(x, merged, own) - want).abs().max()
    assert error <= 1e-5 * max(1.0, float(most))
    assert (own is None) == (not biased and "bias" not in kinds)


def test_scales_rotations_matrices_and_biases_come_in_this_order_wherever_they_stand() -> None:
    """By hand: W is 2 x 2, and what is added is no more scaled or rotated."""
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 6.0])
    deltas = [
        Bias(torch.tensor([100.0, 200.0])),
        LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[1000.0], [2000.0]])),
        Scale(torch.tensor([10.0, 1.0]), Side.OUTPUT),
        # y0' = y1, y1' = -y0
        Rotate(torch.zeros(2), torch.tensor([1.0, -1.0]), torch.tensor([1, 0]).int()),
        Scale(torch.tensor([1.0, 0.5]), Side.INPUT),
    ]
    merged, own = merge_into(weight, bias, deltas)
    assert merged.tolist() == [[1003.0, 2.0], [1990.0, -10.0]]
    assert own is not None
    assert own.tolist() == [106.0, 150.0]
    # Scaled after it was rotated: the first output is the second one's then.
    deltas[2:4] = deltas[3], deltas[2]
    merged, own = merge_into(weight, bias, deltas)
    assert merged.tolist() == [[1030.0, 20.0], [1999.0, -1.0]]
    assert own is not None
    assert own.tolist() == [160.0, 195.0]


def test_of_several_deltas_of_a_kind_each_counts() -> None:
    weight, one = torch.ones(3, 2), torch.tensor([2.0, 3.0, 5.0])
    scales = [Scale(one, Side.OUTPUT), Scale(one, Side.OUTPUT)]
    merged, own = merge_into(weight, None, [*scales, Bias(one), Bias(one)])
    assert merged.tolist() == [[4.0, 4.0], [9.0, 9.0], [25.0, 25.0]]
    assert own is not None
    assert own.tolist() == [4.0, 6.0, 10.0]


def test_the_base_is_left_alone(delta_makers: Makers) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(12, 18), torch.randn(12)
    before = weight.clone(), bias.clone()
    for kind in MERGED:
        merged, own = merge_into(weight, bias, [delta_makers[kind]((12, 18))])
        changed = not torch.equal(merged, weight), own is None or not torch.equal(own, bias)
        assert any(changed)
        assert torch.equal(weight, before[0])
        assert torch.equal(bias, before[1])


def test_without_deltas_the_base_comes_back() -> None:
    weight, bias = torch.randn(5, 3), torch.randn(5)
    assert merge_into(weight, None, []) == (weight, None)
    assert merge_into(weight, bias, []) == (weight, bias)


def test_what_depends_on_the_input_cannot_be_merged(delta_makers: Makers) -> None:
    deltas = [delta_makers["bias"]((12, 18)), delta_makers["top k"]((12, 18))]
    with pytest.raises(InvalidAdapterError, match=r"TopK cannot be merged .* not linear in"):
        merge_into(torch.ones(12, 18), None, deltas)


@pytest.mark.parametrize(
    "delta",
    [
        Prefix(torch.ones(3, 2, 5, 1, 12)),
        Prompt(torch.ones(5, 18)),
        Invocation((3,)),
        NormWeight(torch.ones(12)),
        TokenRows(torch.tensor([0]), torch.ones(1, 18)),
    ],
    ids=lambda delta: delta.kind,
)
def test_what_no_linear_layer_has_cannot_be_merged(delta: Delta) -> None:
    with pytest.raises(InvalidAdapterError, match=rf"{delta.kind} cannot be merged into a weight:"):
        merge_into(torch.ones(12, 18), None, [delta])
