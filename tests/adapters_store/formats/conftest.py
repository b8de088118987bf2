"""Adapters that PEFT makes, and what its own layers compute with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.merged_weight import merge_into
from polydelta.adapters_store.reference import AdapterRef

# Of what PEFT computes and what the deltas read from its file amount to, float32.
TOLERANCE = 1e-4

MakePeft = Callable[..., PeftModel]
CheckParity = Callable[[PeftConfig, LlamaForCausalLM], Adapter]


@pytest.fixture
def make_peft(tmp_path: Path) -> MakePeft:
    """An adapter over a model, all that PEFT trains of it random, also saved in `tmp_path`/name."""

    def make(
        config: PeftConfig, model: LlamaForCausalLM, name: str = "adapter", std: float = 0.1
    ) -> PeftModel:
        torch.manual_seed(len(name))
        peft = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * std)
        peft.eval().save_pretrained(tmp_path / name)
        return peft

    return make


@pytest.fixture
def check_parity(
    make_peft: MakePeft, tmp_path: Path, layout_of: Callable[[LlamaForCausalLM], BaseLayout]
) -> CheckParity:
    """Reads what PEFT saves, and holds every linear layer that it changes against PEFT's own."""

    def check(config: PeftConfig, model: LlamaForCausalLM) -> Adapter:
        peft, layout = make_peft(config, model), layout_of(model)
        adapter = read_adapter(AdapterRef("adapter", 1, tmp_path / "adapter"), layout)
        changed = 0.0
        for module, deltas in adapter.modules.items():
            weight, bias = merge_into(layout.weight(module), layout.bias(module), deltas)
            x = torch.randn(5, weight.shape[1])
            got = torch.nn.functional.linear(x, weight, bias)
            with torch.no_grad():
                want = peft.base_model.model.get_submodule(module)(x)
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
            changed += float((want - model.get_submodule(module)(x)).abs().max())
        assert changed > 0.1, "the adapter does nothing"
        return adapter

    return check
