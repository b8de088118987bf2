from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import MODEL
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft import (
    lora,
)

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
    "DoRA without magnitudes": ({"use_dora": True}, "but no lora_magnitude_vector"),
    "a bias on B that is not there": ({"lora_bias": True}, "but no lora_B.bias"),
    "KaSA without a diagonal": ({"kasa_config": {}}, "but no lora_diag"),
    "saved modules that are not there": (
        {"modules_to_save": ["norm"]},
        r"modules_to_save is \['norm'\], but .* no weight of",
    ),
    "trained tokens that are not there": (
        {"trainable_token_indices": [3]},
        "names trained tokens of 'model.embed_tokens', but .* does not have their rows",
    ),
    "tokens beyond the base's": (
        {"alora_invocation_tokens": [3, 40]},
        "alora_invocation_tokens has the id 40, but the base model has 40 tokens",
    ),
    "replicated layers": ({"layer_replication": [[0, 4]]}, "layer_replication is"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "blocks that do not divide the rank": (
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 3}},
        "the rank of '.*q_proj' is 2, which use_bdlora's 3 blocks do not divide",
    ),
    "blocks of a full matrix": (
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
        r"shape \[2, 36\], but the base model's layer asks for \[2, 18\]",
    ),
    "groups that do not divide the inputs": (
        {"use_qalora": True, "qalora_group_size": 5, "r": 2},
        "is cut into 5 equal parts by the config, but the base model has 36",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_config_that_does_not_fit_the_tensors_is_refused_by_name(
    config: dict[str, Any],
    message: str,
    make_lora_tensors: Callable[..., dict[str, Tensor]],
    adapter_files: Any,
) -> None:
    tensors = make_lora_tensors()
    if "use_qalora" in config:
        tensors[QA] = torch.ones(2, 7)
    with pytest.raises(InvalidAdapterError, match=message):
        adapter_files.read(adapter_files.write("wrong", tensors, **config))


def test_a_plain_a_is_taken_as_it_is_where_peft_does_not_pool_inputs(adapter_files: Any) -> None:
    plain = adapter_files.read(adapter_files.lora())
    folder = adapter_files.root / "lora"
    config = BASE_CONFIG | {"use_qalora": True, "qalora_group_size": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (delta,), (expected,) = adapter_files.read(folder).modules[Q1], plain.modules[Q1]
    torch.testing.assert_close(delta.a, expected.a, rtol=0, atol=0)


def test_an_a_that_reads_groups_is_spread_over_the_inputs(
    make_lora_tensors: Callable[..., dict[str, Tensor]], adapter_files: Any
) -> None:
    tensors = make_lora_tensors() | {QA: torch.arange(18.0).view(2, 9)}
    folder = adapter_files.write("grouped", tensors, use_qalora=True, qalora_group_size=4)
    (delta,) = adapter_files.read(folder).modules[Q1]
    torch.testing.assert_close(delta.a[:, 1::4] / (9 / 4), tensors[QA])


def test_kasa_on_the_head_is_refused(
    make_lora_tensors: Callable[..., dict[str, Tensor]], adapter_files: Any
) -> None:
    tensors = make_lora_tensors("lm_head") | {f"{PREFIX}lm_head.lora_diag": torch.ones(2)}
    with pytest.raises(InvalidAdapterError, match="kasa_config is on, and changes the weights of"):
        adapter_files.read(adapter_files.write("kasa", tensors, kasa_config={}))


def test_a_variant_that_peft_does_not_have_for_embeddings_is_refused(adapter_files: Any) -> None:
    folder = adapter_files.write("alora", embedding_lora(), alora_invocation_tokens=[1])
    with pytest.raises(InvalidAdapterError, match=r"PEFT itself cannot compute for 'model\.embed_"):
        adapter_files.read(folder)


def embedding_lora() -> dict[str, Tensor]:
    name = f"{PREFIX}model.embed_tokens.lora_embedding"
    return {f"{name}_A": torch.randn(2, 40), f"{name}_B": torch.randn(36, 2)}


def test_kasa_needs_a_rank_below_the_layers(
    make_lora_tensors: Callable[..., dict[str, Tensor]], adapter_files: Any
) -> None:
    module = "model.layers.0.self_attn.k_proj"
    tensors = {
        f"{PREFIX}{module}.lora_A.weight": torch.ones(12, 36),
        f"{PREFIX}{module}.lora_B.weight": torch.ones(12, 12),
        f"{PREFIX}{module}.lora_diag": torch.ones(12),
    }
    with pytest.raises(InvalidAdapterError, match="has rank 12, but KaSA needs a lower one"):
        adapter_files.read(adapter_files.write("kasa", tensors, kasa_config={}, r=12))


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
    "nothing": (lambda tensors: tensors.clear(), "changes no module, so it would give"),
    "another rank than r": (_set(QA, torch.ones(3, 36)), r"\[3, 36\], but rank 2 .* \[2, 36\]"),
    "B of another rank": (_set(QB, torch.ones(36, 3)), r"\[36, 3\], but rank 2"),
    "another hidden size": (_set(QA, torch.ones(2, 40)), r"\[2, 40\], but the base.*\[2, 36\]"),
    "another output size": (_set(QB, torch.ones(12, 2)), r"\[12, 2\], but the base.*\[36, 2\]"),
    "a transposed A": (_set(QA, torch.ones(36, 2)), r"lora_A.weight' has shape \[36, 2\]"),
    "an empty shard": (_set(QA, torch.ones(0)), r"lora_A.weight' has shape \[0\]"),
    "a vector for A": (_set(QA, torch.ones(2)), r"lora_A.weight' has shape \[2\]"),
    "a scalar for B": (_set(QB, torch.ones(())), r"lora_B.weight' has shape \[\]"),
    "three dimensions": (_set(QA, torch.ones(2, 36, 1)), r"shape \[2, 36, 1\]"),
    "infinity": (_set(QB, torch.full((36, 2), -torch.inf)), "lora_B.weight' has NaN or infinite"),
    "NaN in float8": (
        _set(QA, torch.full((2, 36), torch.nan).to(torch.float8_e4m3fn)),
        "has NaN or infinite",
    ),
    "integers": (_set(QA, torch.ones(2, 36, dtype=torch.int32)), "is torch.int32"),
    "a magnitude vector": (
        _set(f"{PREFIX}{Q1}.lora_magnitude_vector", torch.ones(36)),
        "has lora_magnitude_vector, which the options in adapter_config.json do not give it",
    ),
    "a diagonal": (_set(f"{PREFIX}{Q1}.lora_diag", torch.ones(2)), "has lora_diag, which the"),
    "a bias on B": (_set(f"{PREFIX}{Q1}.lora_B.bias", torch.ones(36)), "has lora_B.bias, which"),
    "a bias": (
        _set(f"{PREFIX}{Q1}.base_layer.bias", torch.ones(36)),
        "has a bias of '.*q_proj', but the base model has none there",
    ),
    "an adapter's name in a tensor's": (
        _rename(QA, f"{PREFIX}{Q1}.lora_A.default.weight"),
        "lora_A.default.weight' cannot be served",
    ),
    "no prefix": (_rename(QA, QA.removeprefix(PREFIX)), "only tensors named base_model.model."),
    "an embedding of another vocabulary": (
        _set(f"{PREFIX}model.embed_tokens.weight", torch.ones(41, 36)),
        "has rows for 41 tokens, but the base model has 40: resize the base's embeddings",
    ),
    "a linear LoRA of the embedding": (
        _lora("model.embed_tokens", 36, 40),
        "'model.embed_tokens' has .* but no lora_embedding_A",
    ),
    "a LoRA of another vocabulary's head": (
        _lora("lm_head", 41),
        r"shape \[41, 2\], but the base model's layer asks for \[40, 2\]",
    ),
    "a layer too many": (
        _lora("model.layers.3.self_attn.q_proj"),
        "'model.layers.3.self_attn.q_proj', but the base model has no .* 3 decoder layers",
    ),
    "a module of another architecture": (
        _lora("model.layers.0.block_sparse_moe.gate"),
        "block_sparse_moe.gate', but the base model has no such module",
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


OUTLINES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], tuple[Any, ...]]] = {
    "plain": ({}, {}, ("LowRank", 2)),
    "DoRA": ({"use_dora": True}, {"lora_magnitude_vector": (36,)}, ("LowRank", 2, ("Scale",))),
    "KaSA": ({"kasa_config": {}}, {"lora_diag": (2,)}, ("LowRank", 4)),
    "a bias on B": ({"lora_bias": True}, {"lora_B.bias": (36,)}, ("LowRank", 2, ("Bias",))),
}


@pytest.mark.parametrize(("config", "more", "expected"), OUTLINES.values(), ids=OUTLINES.keys())
def test_an_outline_needs_no_base_and_no_numbers(
    config: dict[str, Any], more: dict[str, tuple[int, ...]], expected: tuple[Any, ...]
) -> None:
    shapes = {QA: (2, 36), QB: (36, 2), **{f"{PREFIX}{Q1}.{key}": more[key] for key in more}}
    outline = lora.outline(BASE_CONFIG | config, shapes)
    assert outline == {Q1: ModuleOutline(*expected)}


def test_an_outline_says_that_tokens_invoke_the_adapter() -> None:
    config = BASE_CONFIG | {"alora_invocation_tokens": [5]}
    outline = lora.outline(config, {QA: (2, 36), QB: (36, 2)})
    assert outline[MODEL] == ModuleOutline("Invocation", 0)
