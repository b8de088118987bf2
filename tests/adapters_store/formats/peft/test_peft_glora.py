from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from peft import GloraConfig
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Bias, Dense, LowRank, Scale
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.glora import FORMAT

TARGETS = ["q_proj", "k_proj", "down_proj"]
MODULE = "base_model.model.model.layers.1.self_attn.k_proj."
CONFIG = {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}
# Way of A and B -> the kinds over a layer without a bias.
KINDS = {
    "lora": (Dense.kind,),
    "vector": (LowRank.kind, Scale.kind),
    "constant": (LowRank.kind, Scale.kind),
    "none": (),
}


def options(weight: str, c: str, rest: str) -> dict[str, str]:
    return {"config_A_B": weight, "config_C": c, "config_D_E": rest}


@pytest.mark.parametrize("weight", ["lora", "vector", "constant"])
def test_deltas_amount_to_what_peft_computes_over_layers_without_biases(
    weight: str, base_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = GloraConfig(
        r=3, target_modules=[*TARGETS, "lm_head"], **options(weight, "lora", "vector")
    )
    adapter = check_parity(config, base_model)
    assert (adapter.kinds, len(adapter.modules)) == (KINDS[weight], 10)


@pytest.mark.parametrize(
    ("weight", "c", "rest"),
    [
        ways
        for ways in product(KINDS, ("lora", "vector", "none"), ("vector", "constant", "none"))
        if set(ways) != {"none"}
    ],
)
def test_deltas_amount_to_what_peft_computes_over_layers_with_biases(
    weight: str, c: str, rest: str, biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = GloraConfig(r=3, target_modules=TARGETS, **options(weight, c, rest))
    adapter = check_parity(config, biased_model)
    assert set(adapter.kinds) == {*KINDS[weight], Bias.kind}


def test_an_adapter_that_changes_nothing_of_a_layer_is_refused(
    base_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = GloraConfig(target_modules=TARGETS, **options("none", "lora", "vector"))
    with pytest.raises(InvalidAdapterError, match="has zeros alone"):
        check_parity(config, base_model)


def constant() -> dict[str, torch.Tensor]:
    """For CONFIG, over a layer without a bias."""
    trained = {f"{MODULE}glora_{path}.X": torch.ones(1) for path in "AB"}
    zeros = {f"{MODULE}glora_{path}.zeros": torch.zeros(12) for path in "DE"}
    return {**trained, **zeros, f"{MODULE}glora_C.zeros": torch.zeros(36, 1)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config_A_B": "Lora"}, "config_A_B is 'Lora', but must be one of"),
        ({"config_A_B": "none"}, "no glora_A.zeros"),
        ({"config_A_B": "lora"}, "no glora_A.Xd"),
        ({"config_C": "constant"}, "config_C is 'constant'"),
        ({"config_D_E": None}, "config_D_E is None"),
        ({"bias": "glora_only"}, "bias is 'glora_only'"),
        ({"bias": "all"}, "bias is 'all'; trained biases"),
        ({"bias": True}, "bias is True; trained biases"),
        ({"bias": ["none"]}, r"bias is \['none'\]; trained biases"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_by_name(
    changed: dict[str, Any], message: str, base_model: LlamaForCausalLM, layout_of: Any
) -> None:
    layout = layout_of(base_model)
    for off in ({}, {"bias": None}, {"bias": "none"}):
        assert len(FORMAT.read(CONFIG | off, constant(), layout)) == 1
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | changed, constant(), layout)


def test_an_adapter_of_layers_without_biases_is_refused_over_layers_that_have_them(
    biased_model: LlamaForCausalLM, base_model: LlamaForCausalLM, layout_of: Any
) -> None:
    config = CONFIG | {"config_D_E": "vector"}
    with pytest.raises(InvalidAdapterError, match="was trained over a layer without a bias"):
        FORMAT.read(config, constant(), layout_of(biased_model))
    tensors = {
        name.replace("zeros", "X") if name.endswith(("D.zeros", "E.zeros")) else name: tensor
        for name, tensor in constant().items()
    }
    with pytest.raises(InvalidAdapterError, match="was trained over a layer with a bias"):
        FORMAT.read(config, tensors, layout_of(base_model))


def test_zeros_that_are_not_zero_are_refused(base_model: LlamaForCausalLM, layout_of: Any) -> None:
    tensors = constant() | {f"{MODULE}glora_E.zeros": torch.eye(12)[3]}
    with pytest.raises(InvalidAdapterError, match=r"glora_E.zeros of .* are not all 0"):
        FORMAT.read(CONFIG, tensors, layout_of(base_model))
