from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import FourierFTConfig
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.fourierft import FORMAT

TARGETS = ["q_proj", "k_proj", "down_proj"]
SPECTRUM = "base_model.model.model.layers.1.self_attn.k_proj.fourierft_spectrum"
CONFIG = {"peft_type": "FOURIERFT", "scaling": 1.0, "random_loc_seed": 1}


@pytest.fixture(params=["base_model", "biased_model"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "options",
    [
        {"n_frequency": 50},
        {"n_frequency": 36 * 12, "random_loc_seed": 5},
        {"n_frequency": 31, "n_frequency_pattern": {"k_proj": 7}},
        {"n_frequency": 20, "init_weights": True, "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_deltas_amount_to_what_peft_computes(
    options: dict[str, Any], model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = FourierFTConfig(target_modules=TARGETS, scaling=300.0, **options)
    adapter = check_parity(config, model)
    assert adapter.kinds == (Dense.kind,)
    assert len(adapter.modules) == (3 if "layers_to_transform" in options else 9)


def test_an_adapted_head_is_read(base_model: LlamaForCausalLM, check_parity: Any) -> None:
    config = FourierFTConfig(target_modules=["lm_head", "q_proj"], n_frequency=30)
    assert "lm_head" in check_parity(config, base_model).modules


def test_more_frequencies_than_weights_are_refused(layout: Any) -> None:
    tensors = {SPECTRUM: torch.ones(36 * 12 + 1)}
    with pytest.raises(InvalidAdapterError, match=r"433 frequencies, but .* has 432 weights"):
        FORMAT.read(CONFIG, tensors, layout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_loc_seed": None}, "random_loc_seed is None"),
        ({"random_loc_seed": 1 << 64}, "random_loc_seed is 18446744073709551616"),
        ({"scaling": "big"}, "scaling is 'big'"),
        ({"use_magic": 1}, "use_magic is 1"),
    ],
)
def test_an_option_that_is_not_read_is_refused_by_name(
    options: dict[str, Any], message: str, layout: Any
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | options, {SPECTRUM: torch.ones(3)}, layout)
