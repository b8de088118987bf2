"""The base's weights as adapters are given them: names, rounding, threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config, Qwen3ForCausalLM

from polydelta.adapters_store.base_layout import EMBEDDING, FINAL_NORM, HEAD, BaseLayout
from polydelta.engine.models.base_weights import CheckpointWeights, checkpoint_layout
from polydelta.engine.models.checkpoint import Checkpoint, open_checkpoint
from polydelta.engine.models.config import from_hf
from polydelta.engine.models.decoder import Decoder, base_layout
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.hf_folder import HfFolder
from polydelta.engine.models.weights import Weights
from polydelta.kernels.ops import kernels_for

SIZES = {
    "vocab_size": 50,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 20,
}

SaveModel = Callable[..., Checkpoint]


@dataclass
class Tensors:
    """A source that knows one name, and how many read from it at the same time."""

    tensor: Tensor
    readers: int = 0
    most_readers: int = 0
    lock: Lock = field(default_factory=Lock)

    def names(self) -> Collection[str]:
        return ("w",)

    def read(self, name: str) -> Tensor:
        with self.lock:
            self.readers += 1
            self.most_readers = max(self.most_readers, self.readers)
        copy = self.tensor.clone()
        with self.lock:
            self.readers -= 1
        return copy


@pytest.fixture
def save_model(tmp_path: Path, default_checkpoint: Checkpoint) -> SaveModel:
    def save(model: LlamaForCausalLM | Qwen3ForCausalLM) -> Checkpoint:
        model.save_pretrained(tmp_path)
        folder = HfFolder(tmp_path)
        return Checkpoint("saved", folder.config, folder, default_checkpoint.tokenizer)

    return save


def test_numbers_are_rounded_to_the_served_dtype_and_given_in_float32() -> None:
    tensor = torch.randn(7, 5)
    got = CheckpointWeights(Tensors(tensor), torch.bfloat16).read("w")
    assert got.dtype == torch.float32
    assert torch.equal(got, tensor.bfloat16().float())
    assert not torch.equal(got, tensor)
    assert torch.equal(CheckpointWeights(Tensors(tensor), torch.float32).read("w"), tensor)


def test_threads_read_from_the_source_one_after_the_other() -> None:
    source = Tensors(torch.randn(300, 300))
    weights = CheckpointWeights(source, torch.bfloat16)
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(weights.read, ["w"] * 64))
    assert source.most_readers == 1
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_name_that_the_checkpoint_lacks_is_named() -> None:
    with pytest.raises(ModelError, match=r"no tensor 'model\.extra\.weight'"):
        CheckpointWeights(Tensors(torch.ones(1)), torch.float32).read("model.extra.weight")


@pytest.mark.parametrize("tied", [False, True])
def test_all_that_the_layout_names_can_be_read_in_its_shape(
    tied: bool, save_model: SaveModel
) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    )
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    layout = checkpoint_layout(save_model(model), torch.float32)
    state = model.state_dict()
    assert layout.biased_modules == layout.module_shapes.keys()
    for module, shape in layout.module_shapes.items():
        assert tuple(layout.weight(module).shape) == shape
        assert torch.equal(layout.weight(module), state[f"{module}.weight"])
        assert torch.equal(layout.bias(module), state[f"{module}.bias"])
    for norm, size in layout.norm_sizes.items():
        assert tuple(layout.weight(norm).shape) == (size,)
    assert layout.tied == tied
    assert torch.equal(layout.weight(EMBEDDING), state["model.embed_tokens.weight"])
    assert torch.equal(layout.weight(HEAD), state["lm_head.weight"])
    assert layout.target_shapes[EMBEDDING] == (36, 50)


def test_norms_of_queries_and_keys_are_in_the_layout_where_the_family_has_them(
    save_model: SaveModel,
) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    layout = checkpoint_layout(save_model(model), torch.float32)
    norms = {name for name in model.state_dict() if "norm" in name}
    assert {f"{name}.weight" for name in layout.norm_sizes} == norms
    assert layout.norm_sizes["model.layers.1.self_attn.k_norm"] == layout.head_dim == 20
    assert layout.norm_sizes[FINAL_NORM] == layout.hidden_size == 36
    assert (layout.vocab_size, layout.num_kv_heads, layout.tied) == (50, 1, False)


def test_only_some_layers_have_biases_in_qwen2() -> None:
    layout = base_layout(from_hf(Qwen2Config(**SIZES).to_dict()), "qwen")
    assert {name.rpartition(".")[2] for name in layout.biased_modules} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    assert layout.bias("model.layers.0.mlp.up_proj") is None


def test_the_fingerprint_is_that_of_the_shapes_and_the_name_alone(
    default_checkpoint: Checkpoint,
) -> None:
    bare = base_layout(default_checkpoint.config, default_checkpoint.id)
    with_weights = checkpoint_layout(default_checkpoint, torch.bfloat16)
    assert bare == with_weights
    # Another one would make worthless whatever stores on disk have packed.
    told = f"{default_checkpoint.id}\n{default_checkpoint.config}"
    assert bare.fingerprint == hashlib.sha256(told.encode()).hexdigest()


def test_other_weights_of_the_same_name_and_shapes_are_told_apart(
    tmp_path: Path, default_checkpoint: Checkpoint
) -> None:
    """What adapters have packed over the first of them is wrong over the others."""
    ids = []
    for folder in (tmp_path / "one" / "base", tmp_path / "two" / "base"):
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
        default_checkpoint.tokenizer.save(folder)
        ids.append(_layout_of(folder).weights_id)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    os.utime(folder / "model.safetensors", ns=(written, written + 1))
    ids.append(_layout_of(folder).weights_id)
    ids.append(checkpoint_layout(default_checkpoint, torch.float32).weights_id)
    assert len(set(ids)) == 4
    assert _layout_of(folder).weights_id == ids[2]


def _layout_of(folder: Path) -> BaseLayout:
    return checkpoint_layout(open_checkpoint(str(folder)), torch.float32)


def test_weights_of_a_gguf_file_are_those_that_the_decoder_multiplies_with(
    default_checkpoint: Checkpoint,
) -> None:
    config = default_checkpoint.config
    layout = checkpoint_layout(default_checkpoint, torch.bfloat16)
    kernels = kernels_for(torch.device("cpu"), torch.float32)
    weights = Weights(default_checkpoint.tensors, torch.bfloat16, lambda done, total: None)
    decoder = Decoder(config, weights, kernels, 16, torch.bfloat16)
    x = torch.randn(3, config.hidden_size).bfloat16()
    got = (
        decoder.layers[1]
        .attention.qkv_proj(x)
        .split((config.q_size, config.kv_size, config.kv_size), -1)
    )
    for part, name in zip(got, ("q_proj", "k_proj", "v_proj"), strict=True):
        want = x.float() @ layout.weight(f"model.layers.1.self_attn.{name}").T
        torch.testing.assert_close(part.float(), want, atol=1e-2, rtol=1e-2)
    assert torch.equal(layout.weight(FINAL_NORM), decoder.norm.weight.float())
    everything = decoder.embed(torch.arange(config.vocab_size))
    assert torch.equal(layout.weight(HEAD), everything.float())
