from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TinyLoraConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.peft.tinylora import FORMAT
from polydelta.adapters_store.reference import AdapterRef

MODULE = "base_model.model.model.layers.{}.self_attn.q_proj.tinylora_{}"
V0, V1 = "base_model.tinylora_v.0", "base_model.tinylora_v.1"
CONFIG = {"peft_type": "TINYLORA", "r": 2, "u": 5, "projection_seed": 42, "weight_tying": 0.0}


def good() -> dict[str, Tensor]:
    """Two modules with a vector each."""
    shapes = {"A": (2, 36), "B": (36, 2), "P": (5, 2, 2)}
    return {V0: torch.randn(5), V1: torch.randn(5)} | {
        MODULE.format(layer, name): torch.randn(shape)
        for layer in (0, 2)
        for name, shape in shapes.items()
    }


@pytest.fixture
def strong_model(biased_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """With weights, and so singular values, that the noise in v makes something of."""
    for parameter in biased_model.parameters():
        parameter.data *= 20
    return biased_model


CONFIGS: dict[str, dict[str, Any]] = {
    "a vector for each module": {"u": 7},
    "an odd rank": {"r": 3, "init_weights": "uniform"},
    "more than the singular values": {"r": 50, "target_modules": ["q_proj", "k_proj"]},
    "one vector for all": {"weight_tying": 1.0},
    # Ten modules in four groups of two, the last of which takes what is left over.
    "groups of two, and a larger one": {"weight_tying": 0.6},
    "biases": {"bias": "all"},
    "one layer": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn again"])
def test_deltas_equal_those_of_peft(
    saved: bool, options: dict[str, Any], strong_model: LlamaForCausalLM, check_parity: Any
) -> None:
    options = {"target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"], **options}
    config = TinyLoraConfig(save_projection=saved, projection_seed=7, **options)
    adapter = check_parity(config, strong_model)
    assert "LowRank" in adapter.kinds
    assert adapter.max_rank == min(options.get("r", 2), 36)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn again"])
def test_the_embedding_is_the_first_module(
    saved: bool,
    strong_model: LlamaForCausalLM,
    make_peft: Any,
    tmp_path: Path,
    layout_of: Any,
) -> None:
    config = TinyLoraConfig(save_projection=saved, target_modules=["v_proj", "embed_tokens"])
    peft = make_peft(config, strong_model)
    adapter = read_adapter(AdapterRef("adapter", 1, tmp_path / "adapter"), layout_of(strong_model))
    assert len(adapter.modules) == 4
    for module, (delta,) in adapter.modules.items():
        assert isinstance(delta, LowRank)
        layer = peft.base_model.model.get_submodule(module)
        expected = layer.get_delta_weight("default").detach()
        expected = expected.T if module == "model.embed_tokens" else expected
        assert expected.abs().max() > 0.05
        torch.testing.assert_close(delta.dense(), expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "another rank": ({"r": 3}, r"tinylora_A' has shape \[2, 36\], but u and r"),
    "a longer vector": ({"u": 6}, r"tinylora_P' has shape \[5, 2, 2\]"),
    "fewer vectors": ({"weight_tying": 1.0}, "has 2 vectors .* but its 2 modules share 1"),
    "more than all": ({"weight_tying": 1.5}, "weight_tying is 1.5, but must be from 0 to 1"),
    "a seed that is none": ({"projection_seed": 0.5}, "projection_seed is 0.5"),
    "projections that should not be there": (
        {"save_projection": False},
        "has tinylora_P, but save_projection is false",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    FORMAT.read(CONFIG, good(), layout)
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, good(), layout)


WRONG = {
    "A of another base": ({MODULE.format(0, "A"): torch.ones(2, 35)}, r"A' has shape \[2, 35\]"),
    "B of another base": ({MODULE.format(2, "B"): torch.ones(12, 2)}, r"B' has shape \[12, 2\]"),
    "a scalar": ({MODULE.format(0, "A"): torch.ones(())}, r"A' has shape \[\]"),
    "a vector that is too long": ({V1: torch.ones(6)}, r"v\.1' has shape \[6\], but u = 5"),
    "a vector too many": ({"base_model.tinylora_v.2": torch.ones(5)}, "has 3 vectors"),
    "a vector without a number": ({"base_model.tinylora_v.a": torch.ones(5)}, "cannot be served"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG, good() | changed, layout)


MISSING = {
    MODULE.format(0, "A"): "no tinylora_A",
    MODULE.format(0, "B"): "no tinylora_B",
    MODULE.format(2, "P"): "no tinylora_P",
    V1: "has 1 vectors",
}


def test_a_vector_of_another_number_is_refused_by_name(layout: BaseLayout) -> None:
    tensors = good()
    tensors["base_model.tinylora_v.7"] = tensors.pop(V1)
    with pytest.raises(InvalidAdapterError, match=r"no base_model\.tinylora_v\.1"):
        FORMAT.read(CONFIG, tensors, layout)
