"""What the store's tests share: a tiny base of odd sizes, and adapter files for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear, LinearPart
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.reference import AdapterRef

HIDDEN, KV, INTERMEDIATE, LAYERS = 36, 12, 52, 3

CONFIGS: dict[str, dict[str, Any]] = {
    "LORA": {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
    "SHIRA": {"peft_type": "SHIRA", "r": 1, "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="session")
def layout() -> BaseLayout:
    return BaseLayout(
        "tiny",
        LAYERS,
        (
            FusedLinear(
                "self_attn.qkv_proj",
                HIDDEN,
                (
                    LinearPart("self_attn.q_proj", HIDDEN),
                    LinearPart("self_attn.k_proj", KV),
                    LinearPart("self_attn.v_proj", KV),
                ),
            ),
            FusedLinear("self_attn.o_proj", HIDDEN, (LinearPart("self_attn.o_proj", HIDDEN),)),
            FusedLinear(
                "mlp.gate_up_proj",
                HIDDEN,
                (
                    LinearPart("mlp.gate_proj", INTERMEDIATE),
                    LinearPart("mlp.up_proj", INTERMEDIATE),
                ),
            ),
            FusedLinear("mlp.down_proj", INTERMEDIATE, (LinearPart("mlp.down_proj", HIDDEN),)),
        ),
    )


@pytest.fixture
def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=12,
            vocab_size=40,
        )
    )


def lora_tensors(
    module: str = "model.layers.1.self_attn.q_proj", rank: int = 2
) -> dict[str, Tensor]:
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, HIDDEN),
        f"base_model.model.{module}.lora_B.weight": torch.randn(HIDDEN, rank),
    }


def shira_tensors(module: str = "model.layers.1.self_attn.q_proj") -> dict[str, Tensor]:
    return {
        f"base_model.model.{module}.shira_weight": torch.randn(4),
        f"base_model.model.{module}.shira_indices": torch.tensor(
            [[0, 0, 7, 35], [3, 35, 0, 35]], dtype=torch.int32
        ),
    }


@dataclass(frozen=True)
class AdapterFiles:
    """Writes adapter folders by hand, so that anything can be wrong with them."""

    root: Path
    layout: BaseLayout

    def write(
        self,
        adapter_id: str,
        tensors: Mapping[str, Tensor],
        format: str = "LORA",
        **config: Any,
    ) -> Path:
        folder = self.root / adapter_id
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(CONFIGS[format] | config))
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        return folder

    def lora(self, adapter_id: str = "lora", **config: Any) -> Path:
        """A LoRA of rank 2 on q_proj of layer 1."""
        return self.write(adapter_id, lora_tensors(), **config)

    def shira(self, adapter_id: str = "shira", **config: Any) -> Path:
        """Four entries in q_proj of layer 1."""
        return self.write(adapter_id, shira_tensors(), "SHIRA", **config)

    def read(self, folder: Path) -> Adapter:
        return read_adapter(AdapterRef(folder.name, 1, folder), self.layout)


@pytest.fixture
def adapter_files(tmp_path: Path, layout: BaseLayout) -> AdapterFiles:
    return AdapterFiles(tmp_path, layout)


@pytest.fixture
def make_lora_tensors() -> Callable[..., dict[str, Tensor]]:
    return lora_tensors


@pytest.fixture
def make_shira_tensors() -> Callable[..., dict[str, Tensor]]:
    return shira_tensors
