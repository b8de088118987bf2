from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.registry import format_of

PREFIX = "base_model.model."
K1, UP2 = "model.layers.1.self_attn.k_proj", "model.layers.2.mlp.up_proj"
SHAPES = {K1: (12, 36), UP2: (52, 36)}
RANK = 3
R = "default_lora_latent_mapping.weight"

CONFIG = {"peft_type": "LORA_XS", "r": RANK, "lora_alpha": 7}
LayoutOf = Callable[[LlamaForCausalLM], BaseLayout]


def latent_tensors(*modules: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {f"{PREFIX}{module}.{R}": torch.randn(RANK, RANK) for module in modules}


def saved_tensors(*modules: str) -> dict[str, Tensor]:
    tensors = latent_tensors(*modules)
    for module in modules:
        out_features, in_features = SHAPES[module]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(RANK, in_features)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out_features, RANK)
    return tensors


def read(config: dict[str, Any], tensors: dict[str, Tensor], layout: BaseLayout) -> dict[str, Any]:
    _, parser = format_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    outline = parser.outline(config, shapes)
    deltas = parser.read(config, tensors, layout)
    assert outline.keys() == deltas.keys()
    assert all(part.kind == LowRank.kind and part.rank == RANK for part in outline.values())
    return dict(deltas)


@pytest.mark.parametrize("format", ["LORA_XS", "LORA_SB"])
def test_saved_matrices_act_around_the_latent_one(format: str, layout: BaseLayout) -> None:
    tensors = saved_tensors(K1, UP2)
    deltas = read(CONFIG | {"peft_type": format}, tensors, layout)
    x = torch.randn(5, 36)
    for module in SHAPES:
        (delta,) = deltas[module]
        shrunk = torch.nn.functional.linear(x, tensors[f"{PREFIX}{module}.lora_A.weight"])
        mapped = torch.nn.functional.linear(shrunk, tensors[f"{PREFIX}{module}.{R}"])
        grown = torch.nn.functional.linear(mapped, tensors[f"{PREFIX}{module}.lora_B.weight"])
        torch.testing.assert_close(x @ delta.dense().T, grown * 7 / RANK, atol=1e-4, rtol=1e-4)


def test_rank_stabilised_scales_are_honoured(layout: BaseLayout) -> None:
    tensors = saved_tensors(K1)
    plain = read(CONFIG, tensors, layout)[K1][0].dense()
    stabilised = read(CONFIG | {"use_rslora": True}, tensors, layout)[K1][0].dense()
    torch.testing.assert_close(stabilised, plain * RANK**0.5, atol=1e-4, rtol=1e-5)


def test_without_saved_matrices_they_come_from_the_base_weight(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    # So small a layer that the estimate of its singular vectors is exact.
    tensors = latent_tensors(K1)
    ((delta,),) = read(CONFIG, tensors, layout_of(base_model)).values()
    weight = base_model.get_submodule(K1).weight.detach()
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    encoder, decoder = (sigma.unsqueeze(1) * vh)[:RANK], u[:, :RANK]
    for rank in range(RANK):
        if encoder[rank][encoder[rank].abs().argmax()] < 0:
            encoder[rank], decoder[:, rank] = -encoder[rank], -decoder[:, rank]
    want = decoder @ tensors[f"{PREFIX}{K1}.{R}"].double() @ encoder * 7 / RANK
    assert want.abs().max() > 0.01
    torch.testing.assert_close(delta.dense().double(), want, atol=1e-5, rtol=1e-4)


def test_the_seed_of_the_reconstruction_is_honoured(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    layout = layout_of(base_model)
    first, second = (
        read(
            CONFIG | {"reconstruct_config": {"svd": {"n_iter": 0, "random_state": seed}}},
            latent_tensors(UP2),
            layout,
        )[UP2][0].dense()
        for seed in (1, 2)
    )
    assert (first - second).abs().max() > 0.01


def test_the_authors_own_reconstruction_config_and_peft_s_own_keys_pass(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    of_peft = LoraConfig(r=RANK, lora_alpha=7, target_modules=["k_proj"]).to_dict()
    reconstruction = {
        "reconstruction_type": "svd",
        "reconstr_mode": "separated",
        "half_init_dec": False,
        "replacement_module_random_init": False,
        "r_squared": True,
        "svd": {"n_iter": 10, "random_state": 42, "rank": RANK},
    }
    config = of_peft | CONFIG | {"reconstruct_config": reconstruction}
    layout = layout_of(base_model)
    ((delta,),) = read(config, latent_tensors(K1), layout).values()
    ((plain,),) = read(CONFIG, latent_tensors(K1), layout).values()
    torch.testing.assert_close(delta.dense(), plain.dense(), atol=0, rtol=0)


def test_the_older_name_of_the_latent_matrix_is_known(layout: BaseLayout) -> None:
    tensors = saved_tensors(K1)
    older = {name.replace(f".{R}", "_lora_latent_mapping.weight"): tensor
             for name, tensor in tensors.items()}  # fmt: skip
    assert older.keys() != tensors.keys()
    ((delta,),) = read(CONFIG, older, layout).values()
    ((same,),) = read(CONFIG, tensors, layout).values()
    torch.testing.assert_close(delta.dense(), same.dense(), atol=0, rtol=0)


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "matrices that were random": (
        {"reconstruct_config": {"replacement_module_random_init": True}},
        "replacement_module_random_init is True.*keep them in the file",
    ),
    "half of a matrix that was random": (
        {"reconstruct_config": {"half_init_dec": True}}, "half_init_dec is True",
    ),
    "an unknown reconstruction": ({"reconstruct_config": {"magic": 1}}, "magic is 1"),
    "a reconstruction that is no object": ({"reconstruct_config": 3}, "reconstruct_config is 3"),
    "iterations without end": (
        {"reconstruct_config": {"svd": {"n_iter": 10**6}}}, "n_iter of svd is 1000000",
    ),
    "another decomposition": (
        {"reconstruct_config": {"svd": {"algorithm": "arpack"}}}, "algorithm is 'arpack'; this",
    ),
    "a rank that is not the file's": ({"r": 4}, r"rank 4 \(r in adapter_config.json\)"),
    "ranks of some modules": ({"rank_pattern": {"k_proj": 2}}, "rank_pattern is"),
    "DoRA": ({"use_dora": True}, "use_dora is True; it is an option of PEFT's LoRA"),
    "a changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "message"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS.keys()
)
def test_an_option_that_is_not_served_is_refused_by_name(
    option: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(CONFIG | option, latent_tensors(K1), layout)


def test_random_matrices_that_were_saved_are_read(layout: BaseLayout) -> None:
    config = CONFIG | {"reconstruct_config": {"replacement_module_random_init": True}}
    assert read(config, saved_tensors(K1), layout).keys() == {K1}


@pytest.mark.parametrize("missing", ["lora_A.weight", "lora_B.weight"])
@pytest.mark.parametrize("format", ["LORA_XS", "LORA_SB"])
def test_one_saved_matrix_alone_is_refused(format: str, missing: str, layout: BaseLayout) -> None:
    tensors = saved_tensors(K1)
    del tensors[f"{PREFIX}{K1}.{missing}"]
    with pytest.raises(InvalidAdapterError, match=f"no {missing}"):
        read(CONFIG | {"peft_type": format}, tensors, layout)


def test_lora_sb_without_saved_matrices_is_refused(layout: BaseLayout) -> None:
    with pytest.raises(InvalidAdapterError, match="no lora_A"):
        read(CONFIG | {"peft_type": "LORA_SB"}, latent_tensors(K1), layout)


WRONG_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "a latent matrix that is no square": ({R: torch.ones(3, 4)}, r"\[3, 4\], but rank 3"),
    "an A of another rank": ({"lora_A.weight": torch.ones(2, 36)}, r"\[2, 36\], but rank 3"),
    "a B of another layer": ({"lora_B.weight": torch.ones(13, 3)}, "the base model's layer asks"),
    "numbers beyond float32": (
        {R: torch.full((3, 3), 1e30), "lora_B.weight": torch.full((12, 3), 1e30)},
        "beyond what float32 holds",
    ),
}


@pytest.mark.parametrize(("changed", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    tensors = saved_tensors(K1) | {
        f"{PREFIX}{K1}.{parameter}": tensor for parameter, tensor in changed.items()
    }
    with pytest.raises(InvalidAdapterError, match=message):
        read(CONFIG, tensors, layout)


def test_a_latent_matrix_under_both_names_is_refused(layout: BaseLayout) -> None:
    twice = {f"{PREFIX}{K1}_lora_latent_mapping.weight": torch.ones(RANK, RANK)}
    with pytest.raises(InvalidAdapterError, match="under both of its names"):
        read(CONFIG, saved_tensors(K1) | twice, layout)


def test_a_rank_beyond_the_layer_s_singular_vectors_is_refused(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    tensors = {f"{PREFIX}{K1}.{R}": torch.ones(13, 13)}
    _, parser = format_of(CONFIG)
    with pytest.raises(InvalidAdapterError, match="fewer singular vectors"):
        parser.read(CONFIG | {"r": 13}, tensors, layout_of(base_model))
