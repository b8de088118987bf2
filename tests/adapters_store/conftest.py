"""What the store's tests share: a tiny base of odd sizes, and adapter files for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear, LinearPart, NormPart
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Circulant,
    Columns,
    Delta,
    Kronecker,
    LowRank,
    OneBit,
    Rotate,
    Rows,
    Scale,
    Side,
    Sparse,
    TopK,
)
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.reference import AdapterRef

HIDDEN, KV, INTERMEDIATE, LAYERS, VOCAB = 36, 12, 52, 3, 40

CONFIGS: dict[str, dict[str, Any]] = {
    "LORA": {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
    "SHIRA": {"peft_type": "SHIRA", "r": 1, "target_modules": ["q_proj"]},
}


def make_layout(model: LlamaForCausalLM | None = None) -> BaseLayout:
    """With the model's weights, where one is given."""
    config = LlamaConfig() if model is None else model.config
    biased, mlp_biased = bool(config.attention_bias), bool(config.mlp_bias)
    linears = (
        FusedLinear(
            "self_attn.qkv_proj",
            HIDDEN,
            (
                LinearPart("self_attn.q_proj", HIDDEN),
                LinearPart("self_attn.k_proj", KV),
                LinearPart("self_attn.v_proj", KV),
            ),
            biased,
        ),
        FusedLinear("self_attn.o_proj", HIDDEN, (LinearPart("self_attn.o_proj", HIDDEN),), biased),
        FusedLinear(
            "mlp.gate_up_proj",
            HIDDEN,
            (LinearPart("mlp.gate_proj", INTERMEDIATE), LinearPart("mlp.up_proj", INTERMEDIATE)),
            mlp_biased,
        ),
        FusedLinear(
            "mlp.down_proj", INTERMEDIATE, (LinearPart("mlp.down_proj", HIDDEN),), mlp_biased
        ),
    )
    return BaseLayout(
        "tiny",
        LAYERS,
        linears,
        (NormPart("input_layernorm", HIDDEN), NormPart("post_attention_layernorm", HIDDEN)),
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        num_kv_heads=1,
        head_dim=KV,
        tied=bool(config.tie_word_embeddings),
        weights=None if model is None else ModelWeights(model),
    )


@dataclass(frozen=True)
class ModelWeights:
    """A transformers model's weights, as formats ask for them."""

    model: LlamaForCausalLM

    def read(self, name: str) -> Tensor:
        return self.model.state_dict()[name].float()


def make_model(**config: Any) -> LlamaForCausalLM:
    """With weights and biases that are all random."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "hidden_size": HIDDEN,
                "intermediate_size": INTERMEDIATE,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "head_dim": KV,
                "vocab_size": VOCAB,
                **config,
            }
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def layout() -> BaseLayout:
    """Without weights."""
    return make_layout()


@pytest.fixture
def base_model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def biased_model() -> LlamaForCausalLM:
    """With a bias on each of its linear layers."""
    return make_model(attention_bias=True, mlp_bias=True)


@pytest.fixture
def layout_of() -> Callable[[LlamaForCausalLM], BaseLayout]:
    """The layout of a model with its weights."""
    return make_layout


def number(below: int) -> int:
    """By chance, from 1 on."""
    return int(torch.randint(1, max(2, below), ()))


def divisor(of: int) -> int:
    found = [d for d in range(1, of + 1) if of % d == 0]
    return found[int(torch.randint(len(found), ()))]


def some(of: int) -> Tensor:
    """A few numbers below that, ascending."""
    return torch.randperm(of)[: number(9)].sort().values.int()


def low_rank(shape: tuple[int, int]) -> LowRank:
    rank = number(20)
    return LowRank(torch.randn(rank, shape[1]), torch.randn(shape[0], rank))


def sparse(shape: tuple[int, int]) -> Sparse:
    wanted = torch.rand(shape) < 0.1
    pointers = torch.nn.functional.pad(wanted.sum(1).cumsum(0), (1, 0)).int()
    columns = wanted.nonzero()[:, 1].int()
    return Sparse(shape, pointers, columns, torch.randn(len(columns)))


def columns(shape: tuple[int, int]) -> Columns:
    indices = some(shape[1])
    return Columns(shape[1], indices, torch.randn(shape[0], len(indices)))


def rows(shape: tuple[int, int]) -> Rows:
    indices = some(shape[0])
    return Rows(shape[0], indices, torch.randn(len(indices), shape[1]))


def one_bit(shape: tuple[int, int]) -> OneBit:
    bits = torch.randint(256, (shape[0], -(-shape[1] // 8)), dtype=torch.uint8)
    # Exact in float32.
    return OneBit(shape[1], bits, number(100) / 64)


def kronecker(shape: tuple[int, int]) -> Kronecker:
    a, b = divisor(shape[0]), divisor(shape[1])
    return Kronecker(torch.randn(a, b), torch.randn(shape[0] // a, shape[1] // b))


def circulant(shape: tuple[int, int]) -> Circulant:
    size = divisor(math.gcd(*shape))
    return Circulant(torch.randn(shape[0] // size, shape[1] // size, size))


def top_k(shape: tuple[int, int]) -> TopK:
    rank = number(20)
    a, b = torch.randn(rank, shape[1]), torch.randn(shape[0], rank)
    return TopK(a, b, torch.randn(rank), number(rank + 1))


def rotate(shape: tuple[int, int]) -> Rotate:
    size = shape[0]
    return Rotate(torch.randn(size), torch.randn(size), torch.randperm(size).int())


@pytest.fixture(scope="session")
def delta_makers() -> Mapping[str, Callable[[tuple[int, int]], Delta]]:
    """Random deltas of a linear layer of the shape `(out, in)`, whatever that is."""
    return {
        "low rank": low_rank,
        "sparse": sparse,
        "columns": columns,
        "rows": rows,
        "one bit": one_bit,
        "kronecker": kronecker,
        "circulant": circulant,
        "top k": top_k,
        "output scale": lambda shape: Scale(torch.randn(shape[0]), Side.OUTPUT),
        "input scale": lambda shape: Scale(torch.randn(shape[1]), Side.INPUT),
        "rotate": rotate,
        "bias": lambda shape: Bias(torch.randn(shape[0])),
    }


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
