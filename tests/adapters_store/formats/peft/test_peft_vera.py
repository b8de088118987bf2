from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PveraConfig, VeraConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.vera import FORMAT, PVERA_FORMAT

Q1 = "model.layers.1.self_attn.q_proj"
LAMBDA_B, LAMBDA_D = (f"base_model.model.{Q1}.vera_lambda_{letter}" for letter in "bd")
A, B = "base_model.vera_A", "base_model.vera_B"
CONFIG = {"peft_type": "VERA", "r": 3, "projection_prng_key": 0, "save_projection": True}


def good() -> dict[str, Tensor]:
    return {
        LAMBDA_B: torch.randn(36),
        LAMBDA_D: torch.randn(3),
        A: torch.randn(3, 40),
        B: torch.randn(52, 3),
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "an odd rank": {"r": 7},
    "modules of different sizes": {
        "r": 5,
        "target_modules": ["q_proj", "k_proj", "gate_proj", "down_proj"],
    },
    "matrices that are drawn again": {"r": 5, "save_projection": False},
    "another seed": {"r": 5, "save_projection": False, "projection_prng_key": 12345},
    # The largest of the file's modules decide on the sizes, and they on what is drawn.
    "matrices of small modules": {
        "r": 4,
        "save_projection": False,
        "target_modules": ["k_proj", "v_proj"],
    },
    "matrices of all modules, the head's being the largest": {
        "r": 4,
        "save_projection": False,
        "target_modules": ["k_proj", "down_proj", "lm_head"],
    },
    "one layer": {"r": 6, "save_projection": False, "layers_to_transform": [2]},
    "trained biases": {"r": 3, "bias": "all"},
    "other starts": {"r": 6, "d_initial": 1.0, "init_weights": False},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("config", [VeraConfig, PveraConfig])
def test_deltas_equal_those_of_peft(
    config: type[VeraConfig] | type[PveraConfig],
    options: dict[str, Any],
    biased_model: LlamaForCausalLM,
    check_parity: Any,
) -> None:
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "d_initial": 0.7, **options}
    adapter = check_parity(config(**options), biased_model)
    kinds = ("Bias", "LowRank") if "bias" in options else ("LowRank",)
    assert (adapter.kinds, adapter.max_rank) == (kinds, options["r"])


REFUSED = {
    "another rank": ({"r": 4}, r"lambda_d' has shape \[3\]"),
    "matrices that should not be there": ({"save_projection": False}, "save_projection is false"),
    "a seed that is none": ({"projection_prng_key": "0"}, "projection_prng_key is '0'"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, good(), layout)


def test_drawing_for_each_token_is_refused_by_name(layout: BaseLayout) -> None:
    with pytest.raises(InvalidAdapterError, match="sample_at_inference is True; drawing"):
        PVERA_FORMAT.read(CONFIG | {"sample_at_inference": True}, {}, layout)


WRONG = {
    "A with too few columns": ({A: torch.ones(3, 35)}, r"up to shape \[52, 35\]"),
    "B with too few rows": ({B: torch.ones(35, 3)}, r"up to shape \[35, 40\]"),
    "A of another rank": ({A: torch.ones(6, 40)}, r"vera_A' has shape \[6, 40\]"),
    "B of another rank": ({B: torch.ones(52, 2)}, r"vera_B' has shape \[52, 2\]"),
    "a scalar A": ({A: torch.ones(())}, r"vera_A of shape \[\]"),
    "a vector of another base": ({LAMBDA_B: torch.ones(12)}, r"lambda_b' has shape \[12\]"),
    "NaN in a shared matrix": ({A: torch.full((3, 40), torch.nan)}, "vera_A' has NaN"),
    "a matrix in a module": ({f"base_model.model.{Q1}.vera_A": torch.ones(3, 36)}, "cannot be"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG, good() | changed, layout)


def test_the_embedding_is_refused_by_name(layout: BaseLayout) -> None:
    tensors = {name.replace(Q1, "model.embed_tokens"): tensor for name, tensor in good().items()}
    with pytest.raises(InvalidAdapterError, match=r"has 'model\.embed_tokens'"):
        FORMAT.read(CONFIG, tensors, layout)


def test_without_modules_nothing_is_drawn(layout: BaseLayout) -> None:
    assert FORMAT.read(CONFIG | {"save_projection": False}, {}, layout) == {}
