from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoHaConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.loha import FORMAT

Q1 = "model.layers.1.self_attn.q_proj"
CONFIG = {"peft_type": "LOHA", "r": 2, "alpha": 3}


def good() -> dict[str, Tensor]:
    shapes = {
        "hada_w1_a": (36, 2),
        "hada_w1_b": (2, 36),
        "hada_w2_a": (36, 2),
        "hada_w2_b": (2, 36),
    }
    return {f"base_model.model.{Q1}.{name}": torch.randn(shape) for name, shape in shapes.items()}


def read(layout: BaseLayout, changed: dict[str, Tensor], **config: Any) -> tuple[Delta, ...]:
    changed = {f"base_model.model.{Q1}.{name}": tensor for name, tensor in changed.items()}
    return FORMAT.read(CONFIG | config, good() | changed, layout)[Q1]


CONFIGS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "an odd rank": ({"r": 3}, {9}),
    "rank 1": ({"r": 1, "alpha": 5}, {1}),
    "ranks by module": ({"rank_pattern": {"k_proj": 1, "down_proj": 5}}, {1, 4, 25}),
    "alphas by module": ({"alpha_pattern": {"q_proj": 1, r"layers\.0\.mlp\..*": 32}}, {4}),
    "no convolutions to be done otherwise": ({"use_effective_conv2d": True}, {4}),
    "random, some layers, and dropout": (
        {"init_weights": False, "layers_to_transform": 1, "rank_dropout": 0.5},
        {4},
    ),
}


@pytest.mark.parametrize(("options", "ranks"), CONFIGS.values(), ids=CONFIGS.keys())
def test_deltas_equal_those_of_peft(
    options: dict[str, Any], ranks: set[int], biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    # Where PEFT starts with zeros, noise alone makes for little.
    options = {"r": 2, "alpha": 64, "init_weights": True, **options}
    adapter = check_parity(
        LoHaConfig(target_modules=["q_proj", "k_proj", "up_proj", "down_proj"], **options),
        biased_model,
    )
    assert {delta.rank for (delta,) in adapter.modules.values()} == ranks


def test_the_head_can_be_changed(base_model: LlamaForCausalLM, check_parity: Any) -> None:
    config = LoHaConfig(alpha=99, target_modules=["lm_head"])
    assert list(check_parity(config, base_model).modules) == ["lm_head"]


def test_the_outline_has_the_rank_of_the_product(layout: BaseLayout) -> None:
    outline = FORMAT.outline(CONFIG, {name: tuple(t.shape) for name, t in good().items()})
    (delta,) = read(layout, {})
    assert isinstance(delta, LowRank)
    assert outline[Q1].rank == delta.rank == 4


REFUSED = {
    "no alpha": ({"alpha": None}, "alpha is None, but must be"),
    "a text for an alpha": ({"alpha_pattern": {"q": "1"}}, r"alpha_pattern\['q'\] is '1'"),
    "a rank of 0": ({"r": 0}, "r is 0, but must be"),
    "another rank": ({"rank_pattern": {"q_proj": 3}}, r"shape \[2, 36\], but rank 3"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, {}, **config)


WRONG = {
    "another rank in the second pair": ({"hada_w2_b": torch.ones(3, 36)}, r"w2_b' has shape \[3"),
    "more inputs than the base": ({"hada_w1_b": torch.ones(2, 37)}, r"w1_b' has shape \[2, 37\]"),
    "fewer outputs than the base": ({"hada_w2_a": torch.ones(12, 2)}, r"w2_a' has shape \[12, 2\]"),
    "a scalar": ({"hada_w1_a": torch.ones(())}, r"w1_a' has shape \[\]"),
    "a convolution's": ({"hada_t1": torch.ones(2, 2, 3, 3)}, "hada_t1' cannot be served"),
    "infinity": ({"hada_w1_b": torch.full((2, 36), torch.inf)}, "w1_b' has NaN or infinite"),
    "too large a product": (
        {"hada_w1_b": torch.full((2, 36), 1e30), "hada_w2_b": torch.full((2, 36), 1e30)},
        "beyond what float32 holds",
    ),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, changed)
