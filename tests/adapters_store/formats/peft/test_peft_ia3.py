from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Scale, Side
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.ia3 import FORMAT

CONFIG: dict[str, Any] = {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
Q_VECTOR, DOWN_VECTOR = f"base_model.model.{Q}.ia3_l", f"base_model.model.{DOWN}.ia3_l"
TENSORS = {Q_VECTOR: torch.ones(36, 1), DOWN_VECTOR: torch.ones(1, 52)}


def sides(modules: Any) -> dict[str, set[Side]]:
    """Last part of the modules' names -> which sides are scaled."""
    found: dict[str, set[Side]] = {}
    for module, (delta,) in modules.items():
        assert isinstance(delta, Scale)
        found.setdefault(module.rpartition(".")[2], set()).add(delta.side)
    return found


EVERY_SIDE = ["q_proj", "k_proj", "up_proj", "down_proj"]
# Feedforward modules -> those of these that are among them.
RULES: dict[str, tuple[list[str] | str, set[str]]] = {
    "none": ([], set()),
    "one": (["down_proj"], {"down_proj"}),
    "a square one": (["q_proj"], {"q_proj"}),
    "all": (EVERY_SIDE, set(EVERY_SIDE)),
    "an expression": (r".*\.mlp\.\w+_proj", {"up_proj", "down_proj"}),
    "an expression with alternatives": (r".*k_proj|.*down_proj", {"k_proj", "down_proj"}),
    "an expression for less than the whole name": (r"down_proj", set()),
}  # fmt: skip


@pytest.mark.parametrize(("feedforward", "expected"), RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
def test_layers_equal_those_of_peft(
    base: str,
    feedforward: list[str] | str,
    expected: set[str],
    check_parity: Any,
    request: pytest.FixtureRequest,
) -> None:
    config = IA3Config(target_modules=EVERY_SIDE, feedforward_modules=feedforward)
    adapter = check_parity(config, request.getfixturevalue(base))
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("IA3", ("Scale",), 0)
    assert sides(adapter.modules) == {
        name: {Side.INPUT if name in expected else Side.OUTPUT} for name in config.target_modules
    }


def test_an_ending_need_not_begin_at_a_dot(layout: BaseLayout) -> None:
    config = CONFIG | {"feedforward_modules": ["n_proj"]}
    modules = FORMAT.read(config, TENSORS, layout)
    assert sides(modules) == {"q_proj": {Side.OUTPUT}, "down_proj": {Side.INPUT}}


def test_without_a_rule_the_shape_decides_of_square_layers_too(layout: BaseLayout) -> None:
    tensors = TENSORS | {Q_VECTOR.replace(Q, Q.replace("q_proj", "o_proj")): torch.ones(1, 36)}
    modules = FORMAT.read(CONFIG | {"feedforward_modules": None}, tensors, layout)
    assert sides(modules) == {
        "q_proj": {Side.OUTPUT},
        "o_proj": {Side.INPUT},
        "down_proj": {Side.INPUT},
    }


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "a rule that is no list": ({"feedforward_modules": 5}, {}, "feedforward_modules is 5"),
    "a list of something else": ({"feedforward_modules": [None]}, {}, r"modules is \[None\]"),
    "a broken expression": ({"feedforward_modules": "("}, {}, "no regular expression"),
    "an expression without end": ({"feedforward_modules": "(.*)*x"}, {}, "repeated groups"),
    "a vector of inputs that scales outputs": (
        {"feedforward_modules": ["q_proj", "down_proj"]},
        {},
        r"\[36, 1\], but feedforward_modules .* this one is among them, asks for \[1, 1\]",
    ),
    "a vector of outputs that scales inputs": (
        {"feedforward_modules": []},
        {},
        r"\[1, 52\], but feedforward_modules .* this one is not among them, asks for \[1, 1\]",
    ),
    "a vector with the wrong axis of a square layer": (
        {},
        {Q_VECTOR: torch.ones(1, 36)},
        "is not among them",
    ),
    "another base": ({}, {DOWN_VECTOR: torch.ones(1, 36)}, r"layer asks for \[1, 52\]"),
    "fewer outputs": ({}, {Q_VECTOR: torch.ones(35, 1)}, r"layer asks for \[36, 1\]"),
    "a plain list of numbers": ({}, {Q_VECTOR: torch.ones(36)}, "shape"),
    "a number": ({}, {Q_VECTOR: torch.ones(())}, "shape"),
    "infinity": ({}, {Q_VECTOR: torch.full((36, 1), torch.inf)}, "NaN or infinite"),
    "integers": ({}, {Q_VECTOR: torch.ones(36, 1, dtype=torch.int32)}, "is torch.int32"),
    "a tensor of another format": (
        {},
        {Q_VECTOR.replace("ia3_l", "beft_bias"): torch.ones(1, 36)},
        "beft_bias' cannot be served",
    ),
    "a norm": ({}, {Q_VECTOR.replace(Q, "model.norm"): torch.ones(36, 1)}, "no such module"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any], tensors: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    FORMAT.read(CONFIG, TENSORS, layout)
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, TENSORS | tensors, layout)
