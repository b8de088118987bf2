from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FrodConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.frod import FORMAT


@pytest.fixture(params=["base_model", "biased_model"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparse_rate": 0.3, "projection_prng_key": 5},
        {"sparse_rate": 0.0, "regularization_alpha": 0.1},
        {"init_weights": False, "layers_to_transform": [0, 2]},
    ],
    ids=str,
)
def test_deltas_amount_to_what_peft_computes(
    options: dict[str, Any], model: LlamaForCausalLM, check_parity: Any
) -> None:
    targets = ["q_proj", "k_proj", "down_proj"] + ["lm_head"] * ("sparse_rate" in options)
    config = FrodConfig(target_modules=targets, progressbar=False, **options)
    adapter = check_parity(config, model)
    assert adapter.kinds == (Dense.kind,)
    assert len(adapter.modules) == (6 if "layers_to_transform" in options else 9) + len(targets) - 3


def test_a_basis_that_cannot_be_inverted_is_handled_as_in_peft(
    base_model: LlamaForCausalLM, check_parity: Any
) -> None:
    """Which it cannot where layers give nothing to some inputs."""
    with torch.no_grad():
        for layer in base_model.model.layers:
            layer.mlp.up_proj.weight[:, :3] = 0
    check_parity(FrodConfig(target_modules=["up_proj"], progressbar=False), base_model)


@pytest.fixture
def saved(
    base_model: LlamaForCausalLM, make_peft: Any, tmp_path: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of an adapter."""
    make_peft(FrodConfig(target_modules=["k_proj"], progressbar=False), base_model)
    folder = tmp_path / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


PLACES, SIZE = (
    "base_model.frod_s_indices.self_attn_k_proj",
    "base_model.frod_s_size.self_attn_k_proj",
)


def test_places_that_come_twice_add_up_as_in_peft(
    saved: Any, base_model: LlamaForCausalLM, layout_of: Any
) -> None:
    config, tensors = saved
    layout = layout_of(base_model)
    tensors[PLACES][:] = 4
    twice = FORMAT.read(config, tensors, layout)
    for name, values in tensors.items():
        if name.endswith("frod_lambda_s_values"):
            tensors[name] = torch.cat((values.sum().view(1), torch.zeros(len(values) - 1)))
    for module, (delta,) in FORMAT.read(config, tensors, layout).items():
        torch.testing.assert_close(twice[module][0].dense(), delta.dense(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({PLACES: torch.full((2, 12), 36)}, "are not rows and columns of a matrix of 36 by 36"),
        ({PLACES: torch.full((2, 12), -1)}, "are not rows and columns"),
        ({PLACES: torch.zeros(2, 12)}, "are not rows and columns"),
        ({SIZE: torch.tensor([36, 12])}, r"is \[36, 12\], but the base model's layer has 36"),
        ({"base_model.frod_V.mlp_up_proj": torch.eye(36)}, "mlp_up_proj' cannot be served"),
    ],
)
def test_wrong_projections_are_refused(
    changed: dict[str, torch.Tensor], message: str, saved: Any, layout: Any
) -> None:
    config, tensors = saved
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(config, tensors | changed, layout)


def test_projections_that_are_not_in_the_file_are_refused(saved: Any, layout: Any) -> None:
    config, tensors = saved
    with pytest.raises(InvalidAdapterError, match="save the adapter again with save_projection"):
        FORMAT.read(config | {"save_projection": False}, tensors, layout)
    without = {name: tensor for name, tensor in tensors.items() if "frod_V" not in name}
    with pytest.raises(InvalidAdapterError, match="no frod_V"):
        FORMAT.read(config, without, layout)
