from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import UniLoraConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.unilora import FORMAT

Q1 = "model.layers.1.self_attn.q_proj"
THETA = "base_model.unilora_theta_d"
INDICES_A, SCALES_B = (
    f"base_model.model.{Q1}.unilora_{name}" for name in ("indices_A", "scales_B")
)
CONFIG: dict[str, Any] = {
    "peft_type": "UNILORA",
    "r": 2,
    "theta_d_length": 9,
    "proj_seed": 42,
    "save_indices": False,
    "target_modules": ["q_proj", "down_proj"],
}
SAVED = CONFIG | {"save_indices": True}


def good() -> dict[str, Tensor]:
    shapes = {"A": (2, 36), "B": (36, 2)}
    return {THETA: torch.randn(9)} | {
        f"base_model.model.{Q1}.unilora_{kind}_{letter}": (
            torch.randint(9, shape) if kind == "indices" else torch.rand(shape)
        )
        for kind in ("indices", "scales")
        for letter, shape in shapes.items()
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "some modules": {"target_modules": ["k_proj", "q_proj", "down_proj"]},
    "all modules": {
        "target_modules": ["up_proj", "down_proj", "o_proj", "q_proj", "v_proj", "lm_head"]
    },
    "an odd rank, another seed": {"r": 3, "proj_seed": 12345},
    "a vector that is longer than the LoRA": {"theta_d_length": 5000, "layers_to_transform": [1]},
    # 9 * (36 + 36 + 36 + 12) * 3 = 40 * 81
    "a vector whose numbers are taken equally often": {"r": 9, "theta_d_length": 81},
    "one layer by its number": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "a module by its path, whatever the layers": {
        "target_modules": ["v_proj", "model.layers.0.mlp.down_proj"],
        "layers_to_transform": [2, 1],
        "layers_pattern": ["layers"],
    },
    "trained biases": {"bias": "all"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn again"])
def test_deltas_equal_those_of_peft(
    saved: bool, options: dict[str, Any], biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    options = {
        "r": 2,
        "theta_d_length": 99,
        "target_modules": ["q_proj", "v_proj"],
        "init_theta_d_bound": 6.0,
        **options,
    }
    adapter = check_parity(UniLoraConfig(save_indices=saved, **options), biased_model)
    kinds = ("Bias", "LowRank") if "bias" in options else ("LowRank",)
    assert (adapter.kinds, adapter.max_rank) == (kinds, options["r"])


def test_without_modules_in_the_file_the_outline_has_the_configs_names() -> None:
    outline = FORMAT.outline(CONFIG, {THETA: (9,)})
    assert {name: (o.kind, o.rank) for name, o in outline.items()} == {
        "q_proj": ("LowRank", 2),
        "down_proj": ("LowRank", 2),
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another length": ({"theta_d_length": 8}, r"theta_d' has shape \[9\], but theta_d_length"),
    "a rank of 0": ({"r": 0}, "r is 0, but must be"),
    "a negative seed": ({"proj_seed": -1}, "proj_seed is -1"),
    "a regular expression": ({"target_modules": ".*proj"}, "target_modules is '.*proj', but must"),
    "no modules": ({"target_modules": None}, "target_modules is None, but must"),
    "modules of another base": ({"target_modules": ["c_attn"]}, "base has no such linear layers"),
    "the embedding": ({"target_modules": ["embed_tokens"]}, "base has no such linear layers"),
    "no layers": ({"layers_to_transform": [3]}, "base has no such linear layers"),
    "layers by name": ({"layers_to_transform": ["1"]}, r"layers_to_transform is \['1'\]"),
    "other layers": ({"layers_pattern": "blocks"}, "layers_pattern is 'blocks', but the base's"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    FORMAT.read(CONFIG, {THETA: torch.randn(9)}, layout)
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, {THETA: torch.randn(9)}, layout)


def test_choices_beside_a_config_without_them_are_refused(layout: BaseLayout) -> None:
    with pytest.raises(InvalidAdapterError, match="as save_indices is false"):
        FORMAT.read(CONFIG, good(), layout)


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "an index too large": ({INDICES_A: torch.full((2, 36), 9)}, "not in 0 to 8"),
    "fractions for indices": ({INDICES_A: torch.ones(2, 36)}, "is torch.float32: indices must"),
    "A of another base": ({INDICES_A: torch.zeros(2, 35).long()}, r"indices_A' has shape \[2, 35"),
    "scales of another base": ({SCALES_B: torch.ones(12, 2)}, r"scales_B' has shape \[12, 2\]"),
    "scales of another rank": ({SCALES_B: torch.ones(36, 3)}, r"scales_B' has shape \[36, 3\]"),
    "another length": ({THETA: torch.ones(8)}, r"theta_d' has shape \[8\], but theta_d_length"),
    "a tensor of another format": (
        {f"base_model.model.{Q1}.lora_A": torch.ones(2, 36)},
        "lora_A' cannot be served",
    ),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(SAVED, good() | changed, layout)
