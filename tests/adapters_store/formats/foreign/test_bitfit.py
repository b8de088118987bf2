"""Adapters that are trained biases alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Bias
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.modules import read_modules
from polydelta.adapters_store.formats.registry import FORMATS

MODULE = "model.layers.1.mlp.up_proj"


def test_new_biases_replace_those_of_the_base(
    biased_model: LlamaForCausalLM, layout_of: Callable[..., Any]
) -> None:
    layout = layout_of(biased_model)
    new = torch.randn(layout.module_shapes[MODULE][0])
    tensors = {f"base_model.model.{MODULE}.bias": new}
    config = {"peft_type": "BITFIT", "bias": "all"}
    modules = read_modules(FORMATS["BITFIT"], config, tensors, layout)
    (delta,) = modules[MODULE]
    assert isinstance(delta, Bias)
    torch.testing.assert_close(layout.bias(MODULE) + delta.vector, new)


def test_another_tensor_is_refused_by_name(
    base_model: LlamaForCausalLM, layout_of: Callable[..., Any]
) -> None:
    tensors = {f"base_model.model.{MODULE}.lora_A.weight": torch.randn(2, 36)}
    with pytest.raises(InvalidAdapterError, match=r"up_proj\.lora_A\.weight.*biases alone"):
        read_modules(FORMATS["BITFIT"], {"peft_type": "BITFIT"}, tensors, layout_of(base_model))


def test_a_file_without_biases_is_an_error(
    base_model: LlamaForCausalLM, layout_of: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidAdapterError, match="changes no module"):
        read_modules(FORMATS["BITFIT"], {"peft_type": "BITFIT"}, {}, layout_of(base_model))
