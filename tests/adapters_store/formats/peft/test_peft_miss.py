from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.miss import BONE_FORMAT, FORMAT

Q1 = "model.layers.1.self_attn.q_proj"
BLOCK = f"base_model.model.{Q1}.miss_block"
CONFIG = {"peft_type": "MISS", "r": 4, "init_weights": True, "mini_r": 1}
BAT = CONFIG | {"init_weights": "bat"}
MINI = CONFIG | {"init_weights": "mini", "mini_r": 6}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "shards that fit": ({"r": 4}, "LowRank"),
    "a shard that is not full": ({"r": 7}, "LowRank"),
    "random": ({"r": 3, "init_weights": False, "layers_to_transform": [2]}, "LowRank"),
    "a block that is repeated": ({"r": 5, "init_weights": "mini", "mini_r": 4}, "LowRank"),
    "a block of one column": ({"r": 4, "init_weights": "mini"}, "LowRank"),
    "changes that depend on the weights": ({"r": 4, "init_weights": "bat"}, "Dense"),
    "trained biases": ({"r": 4, "bias": "all"}, "LowRank"),
}


@pytest.mark.parametrize(("options", "kind"), CONFIGS.values(), ids=CONFIGS.keys())
def test_deltas_equal_those_of_peft(
    options: dict[str, Any], kind: str, biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = MissConfig(
        target_modules=["q_proj", "k_proj", "down_proj"], miss_dropout=0.5, **options
    )
    adapter = check_parity(config, biased_model)
    assert adapter.kinds == (("Bias", kind) if "bias" in options else (kind,))
    assert adapter.max_rank == (0 if kind == "Dense" else options["r"])


def test_the_head_can_be_changed(base_model: LlamaForCausalLM, check_parity: Any) -> None:
    config = MissConfig(r=8, target_modules=["lm_head"])
    assert list(check_parity(config, base_model).modules) == ["lm_head"]


# PEFT renamed Bone to MiSS, with the same formulas.
@pytest.mark.parametrize("variant", [True, "bat"])
def test_bone_is_read_as_miss(
    variant: bool | str,
    base_model: LlamaForCausalLM,
    make_peft: Any,
    tmp_path: Path,
    layout_of: Any,
) -> None:
    make_peft(MissConfig(r=4, init_weights=variant, target_modules=["q_proj"]), base_model)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = FORMAT.read(config, tensors, layout_of(base_model))
    del config["miss_dropout"], config["mini_r"]
    renamed = {name.replace("miss_", "bone_"): tensor for name, tensor in tensors.items()}
    bone = BONE_FORMAT.read(config | {"peft_type": "BONE"}, renamed, layout_of(base_model))
    assert bone.keys() == expected.keys()
    for module, (delta,) in bone.items():
        torch.testing.assert_close(delta.dense(), expected[module][0].dense(), rtol=0, atol=0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a rank of 0": ({"r": 0}, "r is 0, but must be"),
    "another rank": ({"r": 3}, r"block' has shape \[4, 36\], but r = 3"),
    "an unknown variant": ({"init_weights": "owl"}, "init_weights is 'owl', but must be true"),
    "a number for a variant": ({"init_weights": 1}, "init_weights is 1, but must be true"),
    "no repeated columns": ({"init_weights": "mini", "mini_r": 0}, "mini_r is 0, but must be"),
    "a variant of another shape": ({"init_weights": "bat"}, r"asks for \[4, 4, 4\]"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, {BLOCK: torch.randn(4, 36)}, layout)


def test_bone_has_no_repeated_blocks(layout: BaseLayout) -> None:
    tensors = {BLOCK.replace("miss", "bone"): torch.randn(4, 36)}
    assert BONE_FORMAT.read({"peft_type": "BONE", "r": 4, "init_weights": True}, tensors, layout)
    with pytest.raises(InvalidAdapterError, match="init_weights is 'mini'"):
        BONE_FORMAT.read({"peft_type": "BONE", "r": 4, "init_weights": "mini"}, tensors, layout)


WRONG: dict[str, tuple[dict[str, Any], Tensor, str]] = {
    "another base": (CONFIG, torch.ones(4, 12), r"shape \[4, 12\]"),
    "a scalar": (CONFIG, torch.ones(()), r"shape \[\]"),
    "integers": (CONFIG, torch.ones(4, 36, dtype=torch.int32), "is torch.int32"),
    "columns that do not fit": (MINI, torch.ones(4, 5), r"but \[r, mini_r\] in"),
    "columns that do not repeat evenly": (
        MINI | {"mini_r": 5},
        torch.ones(4, 5),
        "mini_r is 5, which does not divide the 36 outputs",
    ),
    "blocks of another base": (BAT, torch.ones(3, 4, 4), r"shape \[3, 4, 4\]"),
    "blocks that are not square": (BAT, torch.ones(9, 4, 3), r"shape \[9, 4, 3\]"),
    "blocks that do not fit": (BAT | {"r": 5}, torch.ones(7, 5, 5), "r is 5, which does not"),
}


@pytest.mark.parametrize(("config", "block", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_block_is_refused_by_name(
    config: dict[str, Any], block: Tensor, message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(config, {BLOCK: block}, layout)


def test_a_tensor_of_another_format_is_refused_by_name(layout: BaseLayout) -> None:
    tensors = {BLOCK: torch.ones(4, 36), BLOCK.replace("miss", "bone"): torch.ones(4, 36)}
    with pytest.raises(InvalidAdapterError, match="bone_block' cannot be served"):
        FORMAT.read(CONFIG, tensors, layout)
