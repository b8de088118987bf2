from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import GraloraConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.gralora import FORMAT

Q1 = "model.layers.1.self_attn.q_proj"
A, B = "gralora_A", "gralora_B"
HYBRID_A, HYBRID_B = "gralora_A_general.weight", "gralora_B_general.weight"
CONFIG = {"peft_type": "GRALORA", "r": 4, "gralora_k": 2, "hybrid_r": 3, "alpha": 5}


def good() -> dict[str, Tensor]:
    shapes = {A: (2, 18, 4), B: (2, 4, 18), HYBRID_A: (3, 36), HYBRID_B: (36, 3)}
    return {f"base_model.model.{Q1}.{name}": torch.randn(shape) for name, shape in shapes.items()}


def read(layout: BaseLayout, changed: dict[str, Tensor], **config: Any) -> tuple[Delta, ...]:
    changed = {f"base_model.model.{Q1}.{name}": tensor for name, tensor in changed.items()}
    return FORMAT.read(CONFIG | config, good() | changed, layout)[Q1]


CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "two blocks": ({"r": 6, "gralora_k": 2}, 12),
    "as many ranks as the layer has": ({"r": 12, "gralora_k": 4}, 36),
    "one block": ({"r": 3, "gralora_k": 1}, 3),
    "an ordinary LoRA beside it": ({"r": 4, "gralora_k": 2, "hybrid_r": 3, "alpha": 7}, 11),
    "trained biases": ({"r": 2, "bias": "all"}, 4),
    "random, and one layer": ({"r": 4, "init_weights": False, "layers_to_transform": [1]}, 8),
}


@pytest.mark.parametrize(("options", "rank"), CONFIGS.values(), ids=CONFIGS.keys())
def test_deltas_equal_those_of_peft(
    options: dict[str, Any], rank: int, biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = GraloraConfig(target_modules=["q_proj", "k_proj", "gate_proj", "down_proj"], **options)
    adapter = check_parity(config, biased_model)
    kinds = ("Bias", "LowRank") if "bias" in options else ("LowRank",)
    assert (adapter.kinds, adapter.max_rank) == (kinds, rank)


def test_the_head_can_be_changed(base_model: LlamaForCausalLM, check_parity: Any) -> None:
    config = GraloraConfig(r=4, target_modules=["lm_head"])
    assert list(check_parity(config, base_model).modules) == ["lm_head"]


def test_the_outline_has_the_rank_of_all_blocks(layout: BaseLayout) -> None:
    outline = FORMAT.outline(CONFIG, {name: tuple(t.shape) for name, t in good().items()})
    (delta,) = read(layout, {})
    assert isinstance(delta, LowRank)
    assert outline[Q1].rank == delta.rank == 2 * 4 + 3


REFUSED = {
    "a rank that is not cut evenly": ({"r": 5}, "gralora_k is 2, which does not divide r = 5"),
    "no blocks": ({"gralora_k": 0}, "gralora_k is 0, but must be"),
    "a negative hybrid rank": ({"hybrid_r": -1}, "hybrid_r is -1, but must be"),
    "another rank": ({"r": 6}, r"A' has shape \[2, 18, 4\], but r and gralora_k"),
    "other blocks": ({"gralora_k": 4}, r"asks for \[4, 18, 4\]"),
    "another hybrid rank": ({"hybrid_r": 2}, r"shape \[3, 36\], but hybrid_r = 2"),
    "no ordinary LoRA": ({"hybrid_r": 0}, "has gralora_A_general.weight, but hybrid_r is 0"),
    "a text for alpha": ({"alpha": "64"}, "alpha is '64'"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, {}, **config)


WRONG = {
    "A of another base": ({A: torch.ones(2, 17, 4)}, r"A' has shape \[2, 17, 4\]"),
    "B of another base": ({B: torch.ones(2, 4, 6)}, r"B' has shape \[2, 4, 6\]"),
    "a matrix for blocks": ({A: torch.ones(2, 4)}, r"A' has shape \[2, 4\]"),
    "a hybrid A of another base": ({HYBRID_A: torch.ones(3, 35)}, r"A_general.weight' has shape"),
    "a hybrid B of another base": ({HYBRID_B: torch.ones(12, 3)}, r"B_general.weight' has shape"),
    "a tensor of another format": ({"lora_A": torch.ones(2, 36)}, "lora_A' cannot be served"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, changed)


def test_a_layer_that_cannot_be_cut_evenly_is_refused(layout: BaseLayout) -> None:
    tensors = {
        f"base_model.model.{Q1}.{A}": torch.ones(5, 7, 5),
        f"base_model.model.{Q1}.{B}": torch.ones(5, 5, 7),
    }
    with pytest.raises(InvalidAdapterError, match=r"gralora_k is 5, which does not .* \[36, 36\]"):
        FORMAT.read(CONFIG | {"r": 5, "gralora_k": 5, "hybrid_r": 0}, tensors, layout)
