from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import DeloraConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.delora import FORMAT

Q1 = "model.layers.1.self_attn.q_proj"
CONFIG = {"peft_type": "DELORA", "r": 2}


def good() -> dict[str, Tensor]:
    tensors = {
        "delora_A": torch.randn(2, 36),
        "delora_B": torch.randn(36, 2),
        "delora_lambda": torch.ones(1),
        "delora_w_norm": torch.ones(36),
    }
    return {f"base_model.model.{Q1}.{name}": tensor for name, tensor in tensors.items()}


def read(layout: BaseLayout, changed: dict[str, Tensor], **config: Any) -> tuple[Delta, ...]:
    changed = {f"base_model.model.{Q1}.{name}": tensor for name, tensor in changed.items()}
    return FORMAT.read(CONFIG | config, good() | changed, layout)[Q1]


CONFIGS: dict[str, dict[str, Any]] = {
    "an odd rank": {"r": 3},
    "ranks by module": {"rank_pattern": {"k_proj": 1, r"layers\.2\.mlp\.down_proj": 5}},
    "strengths by module": {"delora_lambda": 3, "lambda_pattern": {"q_proj": 7}},
    "both started at random": {"init_weights": False},
    "trained biases": {"bias": "all"},
    "some layers, and dropout": {"layers_to_transform": [0, 2], "module_dropout": 0.5},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_deltas_equal_those_of_peft(
    options: dict[str, Any], biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = DeloraConfig(
        **{"r": 2, "target_modules": ["q_proj", "k_proj", "gate_proj", "down_proj"], **options}
    )
    kinds = ("Bias", "LowRank") if "bias" in options else ("LowRank",)
    assert check_parity(config, biased_model).kinds == kinds


def test_the_head_can_be_changed(base_model: LlamaForCausalLM, check_parity: Any) -> None:
    assert list(check_parity(DeloraConfig(target_modules=["lm_head"]), base_model).modules) == [
        "lm_head"
    ]


def test_vectors_of_almost_no_length_are_not_blown_up(layout: BaseLayout) -> None:
    a = torch.randn(2, 36)
    a[1] *= 1e-9
    (delta,) = read(layout, {"delora_A": a})
    assert float(delta.dense().abs().max()) < 10


REFUSED = {
    "a rank of 0": ({"r": 0}, "r is 0, but must be"),
    "a rank of 0 in a pattern": ({"rank_pattern": {"v": 0}}, r"rank_pattern\['v'\] is 0"),
    "another rank": ({"r": 3}, r"shape \[2, 36\], but rank 3"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, {}, **config)


WRONG = {
    "A of another base": ({"delora_A": torch.ones(2, 35)}, r"w_norm.* asks for \[35\]"),
    "B of another base": ({"delora_B": torch.ones(12, 2)}, r"B' has shape \[12, 2\]"),
    "a strength for each rank": ({"delora_lambda": torch.ones(2)}, "one strength a module"),
    "a scalar": ({"delora_A": torch.ones(())}, r"A' has shape \[\]"),
    "too large": (
        {"delora_w_norm": torch.full((36,), 1e38), "delora_A": torch.full((2, 36), 1e10)},
        "beyond what float32 holds",
    ),
    "a tensor of another format": ({"lora_A": torch.ones(2, 36)}, "lora_A' cannot be served"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, changed)
