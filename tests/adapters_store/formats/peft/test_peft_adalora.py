from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.peft.adalora import FORMAT
from polydelta.adapters_store.reference import AdapterRef

Q1 = "model.layers.1.self_attn.q_proj"
CONFIG = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 8, "rank_pattern": None}
TARGETS = ["q_proj", "k_proj", "gate_proj", "down_proj"]


def good() -> dict[str, Tensor]:
    shapes = {"lora_A": (3, 36), "lora_B": (36, 3), "lora_E": (3, 1)}
    return {f"base_model.model.{Q1}.{name}": torch.randn(shape) for name, shape in shapes.items()}


CONFIGS: dict[str, dict[str, Any]] = {
    "the default rank": {"lora_alpha": 300},
    "an odd rank": {"init_r": 5, "lora_alpha": 300},
    "no alpha": {"init_r": 7, "lora_alpha": 0},
    "trained biases": {"init_r": 2, "lora_alpha": 300, "bias": "lora_only"},
    # PEFT writes these into the config, and its layers do not look at them.
    "options of LoRA": {
        "r": 99,
        "lora_alpha": 300,
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 1},
        "init_lora_weights": "gaussian",
        "layers_to_transform": [0, 2],
    },
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_deltas_equal_those_of_peft(
    options: dict[str, Any], biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = AdaLoraConfig(total_step=10, target_modules=TARGETS, **options)
    adapter = check_parity(config, biased_model)
    kinds = ("Bias", "LowRank") if "bias" in options else ("LowRank",)
    assert (adapter.kinds, adapter.max_rank) == (kinds, options.get("init_r", 12))


@pytest.mark.parametrize("alpha", [300, -1])
def test_cut_ranks_equal_what_peft_loads(
    alpha: int, base_model: LlamaForCausalLM, make_peft: Any, tmp_path: Path, layout_of: Any
) -> None:
    config = AdaLoraConfig(init_r=4, lora_alpha=alpha, total_step=10, target_modules=["q_proj"])
    peft = make_peft(config, base_model, std=1.0)
    ranks = {0: 3, 1: 1, 2: 0}
    peft.peft_config["default"].rank_pattern = {
        f"model.layers.{layer}.self_attn.q_proj.lora_E.default": [n >= 4 - rank for n in range(4)]
        for layer, rank in ranks.items()
    }
    peft.save_pretrained(tmp_path / "cut")
    loaded = PeftModel.from_pretrained(base_model, tmp_path / "cut")
    adapter = read_adapter(AdapterRef("cut", 1, tmp_path / "cut"), layout_of(base_model))
    assert adapter.modules.pop("model.layers.2.self_attn.q_proj") == ()
    for layer in (0, 1):
        module = f"model.layers.{layer}.self_attn.q_proj"
        (delta,) = adapter.modules[module]
        assert isinstance(delta, LowRank)
        assert delta.rank == ranks[layer]
        expected = loaded.base_model.model.get_submodule(module).get_delta_weight("default")
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(delta.dense(), expected.detach(), rtol=1e-4, atol=1e-4)


def mask(*kept: object, name: str = f"{Q1}.lora_E") -> dict[str, Any]:
    return {"rank_pattern": {name: list(kept)}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another rank": ({"init_r": 4}, r"lora_A' has shape \[3, 36\], but rank 4"),
    "a rank that was cut": (mask(True, False, True), r"lora_A' has shape \[3, 36\], but rank 2"),
    "a mask of another rank": (mask(True, True), "must be of a module's lora_E and have 3 truth"),
    "numbers for a mask": (mask(1, 1, 1), "must be of a module's lora_E and have 3 truth"),
    "no mask": ({"rank_pattern": {Q1: 3}}, rf"rank_pattern\['{Q1}'\] must be"),
    "a mask of B": (mask(True, True, True, name=f"{Q1}.lora_B"), "lora_B'] must be of a module's"),
    **{
        key: ({key: value}, f"{key} is ")
        for key, value in {
            "alora_invocation_tokens": [1],
            "arrow_config": {"top_k": 1},
            "kasa_config": {"beta": 1},
            "layer_replication": [[0, 2]],
            "loftq_config": {"bits": 4},
            "lora_bias": True,
            "megatron_config": {"a": 1},
            "monteclora_config": {"a": 1},
            "target_parameters": ["a"],
            "trainable_token_indices": [1],
            "use_bdlora": True,
            "use_dora": True,
            "use_qalora": True,
            "velora_config": {"a": 1},
        }.items()
    },
}


def test_every_refused_key_has_its_own_refusal_test() -> None:
    assert FORMAT.rules.refused.keys() <= {key for config, _ in REFUSED.values() for key in config}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    FORMAT.read(CONFIG, good(), layout)
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, good(), layout)


WRONG = {
    "A of another base": ({"lora_A": torch.ones(3, 35)}, r"lora_A' has shape \[3, 35\]"),
    "B of another base": ({"lora_B": torch.ones(12, 3)}, r"lora_B' has shape \[12, 3\]"),
    "a row for E": ({"lora_E": torch.ones(3)}, r"lora_E' has shape \[3\]"),
    "LoRA's own names": ({"lora_A.weight": torch.ones(3, 36)}, "weight' cannot be served"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    changed = {f"base_model.model.{Q1}.{name}": tensor for name, tensor in changed.items()}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG, good() | changed, layout)
