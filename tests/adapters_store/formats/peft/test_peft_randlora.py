from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import RandLoraConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.randlora import FORMAT

# Larger on both sides than inputs or outputs alone.
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
MODULE = "base_model.model.model.layers.1.self_attn.k_proj."


@pytest.fixture(params=["base_model", "biased_model"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
@pytest.mark.parametrize("options", [{"r": 5, "randlora_alpha": 4}, {"r": 6}], ids=str)
def test_deltas_amount_to_what_peft_computes(
    options: dict[str, Any],
    kind: dict[str, Any],
    saved: bool,
    model: LlamaForCausalLM,
    check_parity: Any,
) -> None:
    config = RandLoraConfig(
        target_modules=TARGETS, save_projection=saved, projection_prng_key=3, **options, **kind
    )
    adapter = check_parity(config, model)
    assert (adapter.kinds, len(adapter.modules)) == ((Dense.kind,), 12)


@pytest.mark.parametrize("sparse", [True, False])
def test_bases_drawn_again_are_those_of_peft_bit_by_bit(
    sparse: bool, base_model: LlamaForCausalLM, make_peft: Any, layout_of: Any, tmp_path: Path
) -> None:
    """As the parity of answers leaves room for rounding."""
    config = RandLoraConfig(r=5, target_modules=TARGETS, sparse=sparse)
    make_peft(config, base_model)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    settings = FORMAT.settings(config.to_dict() | {"save_projection": False})
    layout = layout_of(base_model)
    drawn = FORMAT.regenerate(settings, list(layout.module_shapes), layout)
    assert len(drawn) == 2
    for name, basis in drawn.items():
        assert torch.equal(basis, stored[name])


@pytest.fixture
def saved(
    base_model: LlamaForCausalLM, make_peft: Any, tmp_path: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of an adapter."""
    make_peft(RandLoraConfig(r=5, target_modules=["k_proj"]), base_model)
    folder = tmp_path / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def test_a_copy_of_the_bases_that_differs_is_refused(saved: Any, layout: Any) -> None:
    config, tensors = saved
    tensors[f"{MODULE}randlora_B"] = tensors[f"{MODULE}randlora_B"] + 1
    with pytest.raises(
        InvalidAdapterError, match=r"a randlora_B that is not base_model\.randlora_B"
    ):
        FORMAT.read(config, tensors, layout)


def test_bases_that_are_too_small_for_a_layer_are_refused(saved: Any, layout: Any) -> None:
    config, tensors = saved
    for name in tensors:
        if name.endswith("randlora_B"):
            tensors[name] = tensors[name][:-1]
    with pytest.raises(InvalidAdapterError, match="too small for the base model's"):
        FORMAT.read(config, tensors, layout)


def test_bases_must_be_in_the_file_where_the_config_says_so(saved: Any, layout: Any) -> None:
    config, tensors = saved
    with pytest.raises(InvalidAdapterError, match=r"randlora_., but save_projection is false"):
        FORMAT.read(config | {"save_projection": False}, tensors, layout)
    without = {name: tensor for name, tensor in tensors.items() if "randlora_A" not in name}
    with pytest.raises(InvalidAdapterError, match=r"no base_model\.randlora_A"):
        FORMAT.read(config, without, layout)


def test_a_rank_for_which_no_bases_could_be_drawn_is_refused(layout: Any) -> None:
    tensors = {
        f"{MODULE}randlora_lambda": torch.ones(1 << 20, 1),
        f"{MODULE}randlora_gamma": torch.ones(1, 12),
    }
    config = {"r": 1 << 20, "randlora_alpha": 1, "save_projection": False, "projection_prng_key": 0}
    with pytest.raises(InvalidAdapterError, match="r is 1048576, more than the 12 inputs"):
        FORMAT.read(config, tensors, layout)
