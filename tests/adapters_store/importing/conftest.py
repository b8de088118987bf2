"""A base with grouped key-value heads, fine-tunes of it, and what the adapters made of them do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.importing.new_adapter import NewAdapter
from polydelta.adapters_store.merged_weight import merge_into
from polydelta.adapters_store.reference import AdapterRef

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 6

Tune = Callable[[LlamaForCausalLM], LlamaForCausalLM]


def make_model(**config: Any) -> LlamaForCausalLM:
    """All of its weights are random; sizes fit the layout of `layout_of`."""
    torch.manual_seed(5)
    sizes = {
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": 40,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


@pytest.fixture
def grouped_model() -> LlamaForCausalLM:
    """Six query heads read two key-value heads."""
    return make_model()


@pytest.fixture
def make_grouped_model() -> Callable[..., LlamaForCausalLM]:
    return make_model


@pytest.fixture
def grouped_layout(
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
) -> Callable[[LlamaForCausalLM], BaseLayout]:
    """A model's layout with its weights."""

    def make(model: LlamaForCausalLM) -> BaseLayout:
        return replace(
            layout_of(model),
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            vocab_size=model.config.vocab_size,
        )

    return make


@pytest.fixture
def perturbed() -> Tune:
    """A full fine-tune: every parameter has moved."""

    def tune(model: LlamaForCausalLM) -> LlamaForCausalLM:
        torch.manual_seed(8)
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
        return tuned

    return tune


@pytest.fixture
def read_written(tmp_path: Path) -> Callable[[NewAdapter, BaseLayout], Adapter]:
    """Writes an adapter and reads its folder, `tmp_path`/adapter."""

    def read(adapter: NewAdapter, layout: BaseLayout) -> Adapter:
        adapter.write(tmp_path / "adapter", "some/base")
        return read_adapter(AdapterRef("adapter", 1, tmp_path / "adapter"), layout)

    return read


@pytest.fixture
def merged() -> Callable[[LlamaForCausalLM, BaseLayout, Adapter], LlamaForCausalLM]:
    """The base with an adapter's changes of linear layers in its weights."""

    def merge(model: LlamaForCausalLM, layout: BaseLayout, adapter: Adapter) -> LlamaForCausalLM:
        merged = copy.deepcopy(model)
        for module, deltas in adapter.modules.items():
            weight, bias = merge_into(layout.weight(module), layout.bias(module), deltas)
            linear = merged.get_submodule(module)
            with torch.no_grad():
                linear.weight.copy_(weight)
                if isinstance(bias, Tensor):
                    linear.bias.copy_(bias)
        return merged

    return merge
