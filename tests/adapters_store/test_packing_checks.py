"""What is refused before anything is packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, FINAL_NORM, HEAD, MODEL, BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    Dense,
    Invocation,
    NormWeight,
    Prefix,
    Prompt,
    Rotate,
    Scale,
    Side,
    TokenRows,
)
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.packing_checks import check_adapter

Makers = Mapping[str, Callable[[tuple[int, int]], Delta]]

# Of the layout: 36 hidden, 12 of one key/value head, 52 within the MLP, 40 tokens, 3 layers.
Q, K, UP = (
    f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
)
NORM = "model.layers.1.input_layernorm"
LINEAR_KINDS = (
    "low rank", "sparse", "columns", "rows", "one bit", "kronecker", "circulant", "top k",
    "output scale", "input scale", "rotate", "bias",
)  # fmt: skip
# Those that are as long as a layer's output, and one as its input.
OF_OUTPUT, OF_INPUT = ("output scale", "rotate", "bias"), ("input scale",)


def check(layout: BaseLayout, module: str, *deltas: Delta, dtype: torch.dtype) -> None:
    check_adapter(Adapter("id", 1, "", "SOME", {module: deltas}), layout, dtype)


def misfit(module: str, kind: str) -> str:
    return rf"changes '{module}' by a delta of kind {kind}.* does not have or which is not served"


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_delta_of_another_shape_is_refused(
    layout: BaseLayout, delta_makers: Makers, kind: str
) -> None:
    wrong = {(out, in_) for out in (1, 12, 51, 52, 53) for in_ in (1, 35, 36, 37, 52)} - {(52, 36)}
    make = delta_makers[kind]
    check(layout, UP, make((52, 36)), dtype=torch.float32)
    for out, in_ in sorted(wrong):
        delta = make((out, in_))
        if (kind in OF_OUTPUT and out == 52) or (kind in OF_INPUT and in_ == 36):
            check(layout, UP, delta, dtype=torch.float32)
        else:
            with pytest.raises(InvalidAdapterError, match=misfit(UP, delta.kind)):
                check(layout, UP, delta, dtype=torch.float32)


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_one_delta_that_does_not_fit_is_found_among_others(
    layout: BaseLayout, delta_makers: Makers, kind: str
) -> None:
    fitting, other = delta_makers["bias"]((12, 36)), delta_makers[kind]((13, 37))
    with pytest.raises(InvalidAdapterError, match=misfit(K, other.kind)):
        check(layout, K, fitting, other, dtype=torch.float32)


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_linear_layer_that_the_base_lacks_is_refused(
    layout: BaseLayout, delta_makers: Makers, kind: str
) -> None:
    for module in ("model.layers.3.mlp.up_proj", "model.layers.1.mlp.fc1", "up_proj", "visual"):
        with pytest.raises(InvalidAdapterError, match=module):
            check(layout, module, delta_makers[kind]((52, 36)), dtype=torch.float32)


@pytest.mark.parametrize("module", [EMBEDDING, HEAD])
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_of_the_embedding_and_the_head_only_what_is_cut_by_token_is_served(
    layout: BaseLayout, delta_makers: Makers, kind: str, module: str
) -> None:
    delta = delta_makers[kind](layout.target_shapes[module])
    if kind in ("low rank", "output scale", "bias"):
        check(layout, module, delta, dtype=torch.float32)
    else:
        with pytest.raises(InvalidAdapterError, match=misfit(module, delta.kind)):
            check(layout, module, delta, dtype=torch.float32)


def prefix(*shape: int) -> Prefix:
    return Prefix(torch.randn(shape))


def rows_of(*shape: int) -> TokenRows:
    return TokenRows(torch.arange(shape[0]), torch.randn(shape))


def norm(*shape: int) -> NormWeight:
    return NormWeight(torch.randn(shape))


# By what is wrong: the module, and the delta.
MISPLACED: Mapping[str, tuple[str, Delta]] = {
    "a norm's weight on a linear layer": (Q, norm(36)),
    "a norm's weight on the head": (HEAD, norm(40)),
    "a norm's weight of another size": (NORM, norm(35)),
    "a norm's weight as a matrix": (NORM, norm(1, 36)),
    "the last norm's weight of another size": (FINAL_NORM, norm(40)),
    "a norm that the base lacks": ("model.layers.1.self_attn.q_norm", norm(12)),
    "a norm of no layer": ("model.layers.3.input_layernorm", norm(36)),
    "a bias of a norm": (NORM, Bias(torch.randn(36))),
    "a scale of the last norm": (FINAL_NORM, Scale(torch.randn(36), Side.OUTPUT)),
    # As long as the layer's output, so that their sizes do not tell.
    "rows of tokens of a linear layer": (Q, rows_of(3, 36)),
    "virtual tokens of a linear layer": (Q, Prompt(torch.randn(5, 36))),
    "an invocation of a linear layer": (Q, Invocation((3,))),
    "an invocation of the head": (HEAD, Invocation((3,))),
    "a prefix of a linear layer": (Q, prefix(3, 2, 5, 1, 12)),
    "virtual tokens of the embedding": (EMBEDDING, Prompt(torch.randn(5, 36))),
    "rows of tokens of the model": (MODEL, rows_of(3, 36)),
    "a linear delta of the model": (MODEL, Rotate(*torch.randn(2, 36), torch.arange(36))),
    "rows of another width": (EMBEDDING, rows_of(3, 35)),
    "rows of the head of another width": (HEAD, rows_of(3, 40)),
    "a bias of the embedding by token": (EMBEDDING, Bias(torch.randn(40))),
    "a bias of the head that is not by token": (HEAD, Bias(torch.randn(36))),
    "a prefix of more layers": (MODEL, prefix(4, 2, 5, 1, 12)),
    "a prefix without values": (MODEL, prefix(3, 1, 5, 1, 12)),
    "a prefix of more heads": (MODEL, prefix(3, 2, 5, 3, 12)),
    "a prefix of wider heads": (MODEL, prefix(3, 2, 5, 1, 36)),
    "a prefix with an axis more": (MODEL, prefix(3, 2, 5, 1, 12, 1)),
    "virtual tokens of another width": (MODEL, Prompt(torch.randn(5, 12))),
    "virtual tokens with an axis more": (MODEL, Prompt(torch.randn(1, 5, 36))),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_a_kind_where_it_cannot_be_is_refused(layout: BaseLayout, case: str) -> None:
    module, delta = MISPLACED[case]
    with pytest.raises(InvalidAdapterError, match=misfit(module, delta.kind)):
        check(layout, module, delta, dtype=torch.float32)


FITTING: Mapping[str, tuple[str, Delta]] = {
    "a norm's weight": (NORM, norm(36)),
    "the last norm's weight": (FINAL_NORM, norm(36)),
    "rows of the embedding": (EMBEDDING, rows_of(3, 36)),
    "rows of the head": (HEAD, rows_of(40, 36)),
    "a bias of the embedding": (EMBEDDING, Bias(torch.randn(36))),
    "a bias of the head": (HEAD, Bias(torch.randn(40))),
    "a prefix": (MODEL, prefix(3, 2, 5, 1, 12)),
    "a prompt": (MODEL, Prompt(torch.randn(5, 36))),
    "an invocation": (MODEL, Invocation((3, 7))),
}


@pytest.mark.parametrize("case", FITTING)
def test_a_kind_where_it_belongs_is_taken(layout: BaseLayout, case: str) -> None:
    module, delta = FITTING[case]
    check(layout, module, delta, dtype=torch.float32)


def test_what_a_base_does_not_say_of_itself_is_refused_too(layout: BaseLayout) -> None:
    bare = BaseLayout("bare", layout.num_layers, layout.linears)
    for module, delta in FITTING.values():
        if not isinstance(delta, Invocation):
            with pytest.raises(InvalidAdapterError, match=misfit(module, delta.kind)):
                check(bare, module, delta, dtype=torch.float32)


def test_any_change_of_a_weight_is_not_served_and_can_be_converted(layout: BaseLayout) -> None:
    # Of the right shape or not: that is not what is wrong with it.
    for shape in ((36, 36), (3, 5)):
        with pytest.raises(InvalidAdapterError, match=rf"SOME.*'{Q}'.*polydelta adapters convert"):
            check(layout, Q, Dense(torch.randn(shape)), dtype=torch.float32)


def with_number(delta: Delta, value: float) -> list[Delta]:
    """The delta with that number in it, once for each place that numbers are in."""
    made = []
    for field in fields(delta):
        old = getattr(delta, field.name)
        if isinstance(old, float):
            made.append(replace(delta, **{field.name: value}))
        elif isinstance(old, Tensor) and old.is_floating_point():
            changed = old.clone()
            changed.view(-1)[-1] = value
            made.append(replace(delta, **{field.name: changed}))
    return made


@pytest.mark.parametrize("value", [65504.0, 1e5, -1e5, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_number_that_the_dtype_cannot_hold_is_refused_wherever_it_is(
    layout: BaseLayout, delta_makers: Makers, kind: str, value: float
) -> None:
    torch.manual_seed(0)
    changed = with_number(delta_makers[kind]((52, 36)), value)
    assert changed
    for delta in changed:
        if abs(value) < 65520:
            check(layout, UP, delta, dtype=torch.float16)
        else:
            with pytest.raises(InvalidAdapterError, match=rf"'{UP}' by .* fit torch.float16"):
                check(layout, UP, delta, dtype=torch.float16)
    if abs(value) < torch.inf:
        for delta in changed:
            check(layout, UP, delta, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e5, torch.float16), (torch.inf, torch.bfloat16), (torch.nan, torch.float32)],
)
@pytest.mark.parametrize("case", [case for case in FITTING if case != "an invocation"])
def test_a_number_that_the_dtype_cannot_hold_is_refused_outside_linear_layers_too(
    layout: BaseLayout, case: str, value: float, dtype: torch.dtype
) -> None:
    module, delta = FITTING[case]
    (changed,) = with_number(delta, value)
    with pytest.raises(InvalidAdapterError, match=rf"'{module}' by .* fit {dtype}"):
        check(layout, module, changed, dtype=dtype)


def test_a_scale_that_no_float_holds_is_refused(layout: BaseLayout, delta_makers: Makers) -> None:
    for value in (1e39, torch.inf, torch.nan):
        (delta,) = with_number(delta_makers["one bit"]((52, 36)), value)
        with pytest.raises(InvalidAdapterError, match=rf"'{UP}' by .* fit torch.float32"):
            check(layout, UP, delta, dtype=torch.float32)
