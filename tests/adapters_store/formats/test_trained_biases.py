"""PEFT's option `bias`: the base's biases are trained too, all of them or those of adapted layers.

They are read with the saved modules, whatever the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Bias
from polydelta.adapters_store.formats import FORMATS

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "ADALORA": {"init_r": 3, "total_step": 9},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "DEFT": {"init_weights": False},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 9},
    "FROD": {"progressbar": False},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HRA": {"r": 3, "init_weights": False},
    "LORA": {},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PVERA": {"r": 5},
    "RANDLORA": {"r": 5},
    "TINYLORA": {},
    "UNILORA": {"theta_d_length": 9},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "VERA": {"r": 5},
    "WAVEFT": {"n_frequency": 50, "init_weights": False},
}
# What PEFT wants to hear, where it is not the type.
PREFIXES = {"ADALORA": "lora", "FOURIERFT": "fourier"}


def test_these_are_all_tuners_with_the_option_but_glora_whose_own_biases_go_before() -> None:
    with_option = {
        name
        for name in FORMATS.keys() & PEFT_TYPE_TO_CONFIG_MAPPING.keys()
        if "bias" in {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[name])}
    }
    assert with_option == OPTIONS.keys() | {"GLORA"}


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_biases_that_were_trained_are_changed_too(
    name: str, only: bool, biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[name](
        target_modules=["q_proj", "down_proj"],
        bias=f"{PREFIXES.get(name, name.lower())}_only" if only else "all",
        **OPTIONS[name],
    )
    adapter = check_parity(config, biased_model)
    assert Bias.kind in adapter.kinds
    assert len(adapter.modules) == 3 * (2 if only else 7)
