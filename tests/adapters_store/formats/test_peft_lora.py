from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import peft_lora

PREFIX = "base_model.model."
Q1 = "model.layers.1.self_attn.q_proj"
QA, QB = f"{PREFIX}{Q1}.lora_A.weight", f"{PREFIX}{Q1}.lora_B.weight"
BASE_CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PARITY: dict[str, dict[str, Any]] = {
    **{
        f"rank {rank}": {"r": rank, "lora_alpha": 5, "target_modules": LINEARS}
        for rank in (1, 3, 8, 12, 64)
    },
    "a target by regex": {"target_modules": r".*\.[02]\.self_attn\.(q|o)_proj"},
    "all linear layers": {"r": 4, "target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "excluded modules": {
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj", "model.layers.0.mlp.down_proj"],
    },
    "rank-stabilised": {"r": 9, "lora_alpha": 7, "use_rslora": True, "target_modules": LINEARS},
    "a rank pattern": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": LINEARS,
        "rank_pattern": {
            "q_proj": 3,
            r"layers\.1\.mlp\..*": 12,
            "model.layers.2.self_attn.v_proj": 1,
            "proj": 7,
        },
    },
    "an alpha pattern": {
        "r": 4,
        "target_modules": LINEARS,
        "alpha_pattern": {
            "down_proj": 3,
            r".*\.0\.self_attn\.(q|k)_proj": 40,
            "self_attn.q_proj": 5,
        },
    },
    "both patterns, rank-stabilised": {
        "r": 5,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": LINEARS,
        "rank_pattern": {"q_proj": 2, "mlp.up_proj": 11},
        "alpha_pattern": {"q_proj": 13, "k_proj": 1},
    },
    "an orthogonal start": {"r": 6, "init_lora_weights": "orthogonal", "target_modules": LINEARS},
}


@pytest.mark.parametrize("options", PARITY.values(), ids=PARITY.keys())
def test_deltas_equal_those_of_peft(
    options: dict[str, Any], base_model: LlamaForCausalLM, tmp_path: Path, adapter_files: Any
) -> None:
    model = get_peft_model(base_model, LoraConfig(**copy.deepcopy(options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "made-by-peft")
    expected = {
        name.removeprefix(PREFIX): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    adapter = adapter_files.read(tmp_path / "made-by-peft")
    assert adapter.format == "LORA"
    assert adapter.modules.keys() == expected.keys()
    for module, (delta,) in adapter.modules.items():
        assert isinstance(delta, LowRank)
        torch.testing.assert_close(delta.dense(), expected[module], rtol=1e-5, atol=1e-5)


def test_deltas_equal_what_merging_adds_to_the_weights(
    base_model: LlamaForCausalLM, tmp_path: Path, adapter_files: Any
) -> None:
    before = {name: weight.clone() for name, weight in base_model.state_dict().items()}
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=LINEARS)
    model = get_peft_model(base_model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "made-by-peft")
    merged = model.merge_and_unload().state_dict()
    adapter = adapter_files.read(tmp_path / "made-by-peft")
    for name, weight in before.items():
        deltas = adapter.modules.get(name.removesuffix(".weight"), ())
        change = sum(delta.dense() for delta in deltas) if deltas else torch.zeros_like(weight)
        torch.testing.assert_close(change, merged[name] - weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_any_stored_float_dtype_is_read_as_float32(
    dtype: torch.dtype, make_lora_tensors: Callable[..., dict[str, Tensor]], adapter_files: Any
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in make_lora_tensors().items()}
    adapter = adapter_files.read(adapter_files.write("typed", tensors))
    (delta,) = adapter.modules[Q1]
    assert (delta.a.dtype, delta.b.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(delta.a, tensors[QA].float(), rtol=0, atol=0)
    torch.testing.assert_close(delta.b, tensors[QB].float() * 2, rtol=0, atol=0)


def test_a_tensor_that_only_training_needs_is_left_out(
    make_lora_tensors: Callable[..., dict[str, Tensor]], adapter_files: Any
) -> None:
    tensors = make_lora_tensors() | {f"{PREFIX}{Q1}.lora_velora_embed": torch.ones(1)}
    folder = adapter_files.write("velora", tensors, velora_config={"num_groups": 64})
    assert adapter_files.read(folder).modules.keys() == {Q1}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is True; DoRA is not served yet"),
    "a bias on B": ({"lora_bias": True}, "lora_bias is True"),
    "all biases": ({"bias": "all"}, "bias is 'all'"),
    "biases of adapted layers": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "trainable tokens": ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
    "bare parameters": ({"target_parameters": ["experts.up"]}, "target_parameters is"),
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is"),
    "replicated layers": ({"layer_replication": [[0, 4]]}, "layer_replication is"),
    "QALoRA": ({"use_qalora": True}, "use_qalora is True"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa_config is"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config is"),
    "MonteCLoRA": ({"monteclora_config": {"num_samples": 8}}, "monteclora_config is"),
    "Megatron": ({"megatron_config": {"tp": 2}}, "megatron_config is"),
    "transposed bases": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "is 'pissa_niter_16'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    "a start that nobody knows": (
        {"init_lora_weights": ["new"]},
        r"init_lora_weights is \['new'\]",
    ),
    "an unknown option": ({"use_magic": True}, "use_magic is True"),
    "a rank that is no integer": ({"r": "2"}, "r is '2'"),
    "no rank": ({"r": None}, "r is None"),
    "an alpha that is no number": ({"lora_alpha": "4"}, "lora_alpha is '4'"),
    "a scale that is no truth value": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    "a rank pattern that is no object": ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
    "a pattern that is no regex": ({"alpha_pattern": {"(": 2}}, "alpha_pattern has the pattern"),
}


def test_every_refused_key_has_its_own_refusal_test() -> None:
    tested = {key for config, _ in REFUSED.values() for key in config}
    assert peft_lora.KEY_RULES.refused.keys() <= tested


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, adapter_files: Any
) -> None:
    folder = adapter_files.lora(**config)
    with pytest.raises(InvalidAdapterError, match=message):
        adapter_files.read(folder)


@pytest.mark.parametrize("init", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_accepted(init: object, adapter_files: Any) -> None:
    assert adapter_files.read(adapter_files.lora(init_lora_weights=init)).max_rank == 2


Change = Callable[[dict[str, Tensor]], None]


def _rename(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _set(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


def _lora(module: str, rows: int = 36, columns: int = 36) -> Change:
    return lambda tensors: tensors.update(
        {
            f"{PREFIX}{module}.lora_A.weight": torch.ones(2, columns),
            f"{PREFIX}{module}.lora_B.weight": torch.ones(rows, 2),
        }
    )


WRONG_TENSORS: dict[str, tuple[Change, str]] = {
    "A without B": (lambda tensors: tensors.pop(QB), r"q_proj' has lora_A.weight but no lora_B"),
    "B without A": (lambda tensors: tensors.pop(QA), r"q_proj' has lora_B.weight but no lora_A"),
    "nothing": (lambda tensors: tensors.clear(), "changes no module"),
    "another rank than r": (_set(QA, torch.ones(3, 36)), r"\[3, 36\], but rank 2 .* \[2, 36\]"),
    "B of another rank": (_set(QB, torch.ones(36, 3)), r"\[36, 3\], but rank 2"),
    "another hidden size": (_set(QA, torch.ones(2, 40)), r"\[2, 40\], but the base.*\[2, 36\]"),
    "another output size": (_set(QB, torch.ones(12, 2)), r"\[12, 2\], but the base.*\[36, 2\]"),
    "a transposed A": (_set(QA, torch.ones(36, 2)), r"lora_A.weight' has shape \[36, 2\]"),
    "an empty shard": (_set(QA, torch.ones(0)), r"lora_A.weight' has shape \[0\]"),
    "a vector for A": (_set(QA, torch.ones(2)), r"lora_A.weight' has shape \[2\]"),
    "a scalar for B": (_set(QB, torch.ones(())), r"lora_B.weight' has shape \[\]"),
    "three dimensions": (_set(QA, torch.ones(2, 36, 1)), r"shape \[2, 36, 1\]"),
    "NaN": (_set(QA, torch.full((2, 36), torch.nan)), "lora_A.weight' has NaN or infinite"),
    "infinity": (_set(QB, torch.full((36, 2), -torch.inf)), "lora_B.weight' has NaN or infinite"),
    "NaN in float8": (
        _set(QA, torch.full((2, 36), torch.nan).to(torch.float8_e4m3fn)),
        "has NaN or infinite",
    ),
    "integers": (_set(QA, torch.ones(2, 36, dtype=torch.int32)), "is torch.int32"),
    "a magnitude vector": (
        _set(f"{PREFIX}{Q1}.lora_magnitude_vector", torch.ones(36)),
        "lora_magnitude_vector' cannot be served",
    ),
    "a bias": (_set(f"{PREFIX}{Q1}.base_layer.bias", torch.ones(36)), "bias' cannot be served"),
    "an adapter's name in a tensor's": (
        _rename(QA, f"{PREFIX}{Q1}.lora_A.default.weight"),
        "lora_A.default.weight' cannot be served",
    ),
    "no prefix": (_rename(QA, QA.removeprefix(PREFIX)), "only tensors named base_model.model."),
    "a whole embedding": (
        _set(f"{PREFIX}model.embed_tokens.weight", torch.ones(40, 36)),
        "embeddings and lm_head are not served yet",
    ),
    "a LoRA of the embedding": (
        _set(f"{PREFIX}model.embed_tokens.lora_embedding_A", torch.ones(2, 40)),
        "embeddings and lm_head are not served yet",
    ),
    "a LoRA of the head": (
        _lora("lm_head", 40),
        "'lm_head', but changes of embeddings and lm_head",
    ),
    "a layer too many": (
        _lora("model.layers.3.self_attn.q_proj"),
        "'model.layers.3.self_attn.q_proj', but the base model has no .* 3 decoder layers",
    ),
    "a module of another architecture": (
        _lora("model.layers.0.block_sparse_moe.gate"),
        "block_sparse_moe.gate', but the base model has no such linear layer",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_wrong_tensors_are_refused_by_name(
    change: Change,
    message: str,
    make_lora_tensors: Callable[..., dict[str, Tensor]],
    adapter_files: Any,
) -> None:
    tensors = make_lora_tensors()
    change(tensors)
    with pytest.raises(InvalidAdapterError, match=message):
        adapter_files.read(adapter_files.write("wrong", tensors))


def test_an_adapter_of_another_architecture_matches_no_module(
    make_lora_tensors: Callable[..., dict[str, Tensor]], adapter_files: Any
) -> None:
    tensors = make_lora_tensors("transformer.h.0.attn.c_attn")
    with pytest.raises(InvalidAdapterError, match=r"None of the adapter's 1 modules.*c_attn"):
        adapter_files.read(adapter_files.write("gpt", tensors))


def test_an_outline_needs_no_base_and_no_numbers(layout: BaseLayout) -> None:
    shapes = {QA: (2, 36), QB: (36, 2)}
    outline = peft_lora.outline(BASE_CONFIG, shapes)
    assert {module: (o.kind, o.rank) for module, o in outline.items()} == {Q1: ("LowRank", 2)}
