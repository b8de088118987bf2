"""What small files would become: made in little memory, or refused before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError, TooLargeError
from polydelta.adapters_store.formats import quantized
from polydelta.adapters_store.formats.modules import read_modules
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.oft import cayley
from polydelta.adapters_store.formats.peft.random_places import RandomPlaces
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_patterns import ends_in
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.formats.registry import format_of
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.outline import check_growth, check_outline

Q1, K1 = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
Q, K = f"base_model.model.{Q1}", f"base_model.model.{K1}"

Write = Callable[[Mapping[str, Any], Mapping[str, Tensor]], Path]


def read(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    return read_modules(format_of(config)[1], config, tensors, layout)


def unilora(rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {"peft_type": "UNILORA", "r": rank, "theta_d_length": 5, "proj_seed": 1}
    return config | {"target_modules": ["k_proj"]}, {"base_model.unilora_theta_d": torch.randn(5)}


def vera(rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {"peft_type": "VERA", "r": rank, "projection_prng_key": 1, "save_projection": False}
    vectors = {"lambda_b": torch.randn(12), "lambda_d": torch.randn(rank)}
    return config, {f"{K}.vera_{name}": vector for name, vector in vectors.items()}


def loha(rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {"w1_a": (12, rank), "w1_b": (rank, 36), "w2_a": (12, rank), "w2_b": (rank, 36)}
    return {"peft_type": "LOHA", "r": rank, "alpha": 3}, {
        f"{K}.hada_{name}": torch.randn(shape) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("make", [unilora, vera, loha])
@pytest.mark.parametrize("rank", [3, 12, 13, 40])
def test_a_rank_that_the_file_need_not_hold_comes_down_to_the_layer_s(
    make: Callable[..., Any], rank: int, layout: BaseLayout
) -> None:
    (delta,) = read(*make(rank), layout)[K1]
    assert isinstance(delta, LowRank)
    made = rank**2 if make is loha else rank
    assert delta.rank == min(made, 12)


def test_the_product_of_two_matrices_is_the_same_whatever_its_rank(layout: BaseLayout) -> None:
    config, tensors = loha(5)
    u1, v1, u2, v2 = tensors.values()
    (delta,) = read(config, tensors, layout)[K1]
    assert isinstance(delta, LowRank)
    torch.testing.assert_close(delta.dense(), 3 / 5 * (u1 @ v1) * (u2 @ v2))


def hra(rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"peft_type": "HRA", "r": rank}, {f"{K}.hra_u": torch.ones(36, rank).bfloat16()}


@pytest.mark.parametrize("make", [unilora, vera, hra])
def test_a_rank_far_above_the_layer_s_is_refused_before_anything_is_drawn(
    make: Callable[..., Any], layout: BaseLayout, little_memory: None
) -> None:
    config, tensors = make(1 << 18)
    with pytest.raises(InvalidAdapterError, match=r"rank 262144, but no more than (12|36) counts"):
        read(config, tensors, layout)


def lora(rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 1}, {
        f"{K}.lora_A.weight": torch.randn(rank, 36),
        f"{K}.lora_B.weight": torch.randn(12, rank),
    }


def test_a_rank_that_the_file_does_hold_stays(layout: BaseLayout) -> None:
    config, tensors = lora(200)
    (delta,) = read(config, tensors, layout)[K1]
    assert isinstance(delta, LowRank)
    assert torch.equal(delta.a, tensors[f"{K}.lora_A.weight"])


def quantised(group_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A LoRA, A in 8 bits."""
    config, tensors = lora(3)
    name = f"{K}.lora_A.weight"
    how = {"bits": 8, "group_size": group_size, "shapes": {name: [3, 36]}}
    scales = torch.ones(-(-3 * 36 // group_size))
    codes = torch.arange(3 * 36, dtype=torch.int8)
    return config | {quantized.QUANTIZATION: how}, {
        **tensors,
        name: codes,
        name + quantized.SCALE_SUFFIX: scales,
    }


@pytest.mark.parametrize("group_size", [1, 7, 108, 109, 1 << 48])
def test_groups_may_be_larger_than_the_tensor(
    group_size: int, layout: BaseLayout, little_memory: None
) -> None:
    config, plain = quantized.dequantised(*quantised(group_size))
    (delta,) = read(config, plain, layout)[K1]
    assert isinstance(delta, LowRank)
    assert torch.equal(delta.a.flatten(), torch.arange(108.0))


@pytest.mark.parametrize("bits", quantized.LEVELS)
def test_numbers_that_are_unpacked_in_pieces_are_the_same(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.randint(2, (1003,)) * 2 - 1
    scales = torch.rand(-(-1003 // 7))
    config = {quantized.QUANTIZATION: {"bits": bits, "group_size": 7, "shapes": {"x": [17, 59]}}}
    stored = {
        "x": quantized.packed_codes(codes, bits),
        "x" + quantized.SCALE_SUFFIX: scales,
    }
    expected = (codes * scales[torch.arange(1003) // 7]).view(17, 59)
    for piece in (8, 16, 1000, 1008, 1 << 20):
        monkeypatch.setattr(quantized, "_PIECE", piece)
        assert torch.equal(quantized.dequantised(config, stored)[1]["x"], expected)


def test_random_matrices_without_end_are_refused(layout: BaseLayout, little_memory: None) -> None:
    config = {"peft_type": "TINYLORA", "r": 12, "u": 1 << 20, "projection_seed": 1}
    tensors = {
        f"{K}.tinylora_A": torch.randn(12, 36),
        f"{K}.tinylora_B": torch.randn(12, 12),
        "base_model.tinylora_v.0": torch.randn(1 << 20),
    }
    with pytest.raises(InvalidAdapterError, match=r"random tinylora_P of .* more than \d+ numbers"):
        read(config | {"save_projection": False}, tensors, layout)


def test_vectors_that_do_not_fit_the_layer_are_refused_before_they_are_mixed(
    layout: BaseLayout, little_memory: None
) -> None:
    config = {"peft_type": "VBLORA", "r": 90, "num_vectors": 1, "vector_length": 1 << 16, "topk": 1}
    tensors = {
        "base_model.vblora_vector_bank": torch.randn(1, 1 << 16),
        f"{K}.vblora_logits_A": torch.randn(90, 1 << 10, 1),
        f"{K}.vblora_logits_B": torch.randn(1 << 10, 90, 1),
    }
    with pytest.raises(InvalidAdapterError, match=r"shape \[67108864, 67108864\], but the base"):
        read(config, tensors, layout)


def test_choices_and_weights_of_different_pieces_are_refused(layout: BaseLayout) -> None:
    config = {"peft_type": "VBLORA", "r": 2, "num_vectors": 3, "vector_length": 4, "topk": 2}
    pieces = {"A": (2, 9), "B": (3, 2)}
    tensors = {"base_model.vblora_vector_bank": torch.randn(3, 4)}
    for letter, shape in pieces.items():
        tensors[f"{K}.vblora_logits_{letter}_topk_indices"] = torch.zeros(*shape, 2).long()
        tensors[f"{K}.vblora_logits_{letter}_topk_weights"] = torch.randn(*shape, 1)
    chosen = config | {"save_only_topk_weights": True}
    assert read(chosen, tensors, layout)
    tensors[f"{K}.vblora_logits_B_topk_weights"] = torch.randn(1, 2, 1)
    with pytest.raises(InvalidAdapterError, match=r"has shape \[1, 2, 1\], but .* \[3, 2, 1\]"):
        read(chosen, tensors, layout)


def test_a_miss_of_more_shards_than_inputs_is_what_the_first_make(layout: BaseLayout) -> None:
    block = torch.randn(40, 12)
    config = {"peft_type": "MISS", "r": 40, "mini_r": 1}
    (delta,) = read(config, {f"{K}.miss_block": block}, layout)[K1]
    assert isinstance(delta, LowRank)
    assert delta.rank == 36
    # Each input is a shard of its own: y += block.T @ x, x padded with zeros.
    assert torch.equal(delta.dense(), block[:36].T)


def test_random_places_are_those_of_one_shuffle() -> None:
    places = RandomPlaces(7)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(7))
    for count in (0, 3, 1000, 999):
        assert torch.equal(places(1000, count), shuffled[:count])
    assert places(1000, 5).dtype == torch.int64
    assert sorted(places(36, 36).tolist()) == list(range(36))


def test_a_rotation_of_enormous_numbers_is_refused() -> None:
    skew = torch.full((1, 3, 3), 1e20).triu(1)
    with pytest.raises(InvalidAdapterError, match="numbers so large that no rotation"):
        cayley(skew - skew.transpose(1, 2))


def test_shared_tensors_are_converted_once_for_all_modules(layout: BaseLayout) -> None:
    seen: list[Tensor] = []

    def read_module(_: Config, module: ModuleTensors) -> tuple[Delta, ...]:
        seen.append(module["base_model.x"])
        return ()

    parser = PeftFormat(
        rules=key_rules(),
        parameters=Parameters(("a",), shared=("base_model.x",)),
        outline_module=lambda _, shapes: ModuleOutline("LowRank", 0),
        read_module=read_module,
    )
    tensors = {f"{Q}.a": torch.ones(1), f"{K}.a": torch.ones(1)}
    parser.read({}, {**tensors, "base_model.x": torch.ones(3).bfloat16()}, layout)
    first, second = seen
    assert first is second
    assert first.dtype == torch.float32


@pytest.mark.parametrize("name", ["", "q_proj", "layers.1.q_proj", "layers.1.q_projx"])
def test_endings_are_those_that_strings_have(name: str) -> None:
    for endings in (["q_proj"], ["1.q_proj", "x"], [""], [], ["ayers.1.q_proj", "v"]):
        assert ends_in(name, set(endings)) == name.endswith(tuple(endings))


MANY = [f"{number:x}!" for number in range(90_000)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_bdlora": {"target_modules_bd_a": MANY}}, "has 90000 parts of names, more than 64"),
        ({"modules_to_save": [*MANY, "norm"]}, "modules_to_save is .* no weight"),
        ({"peft_type": "IA3", "feedforward_modules": [*MANY, "7.self_attn.q_proj"]}, "ia3_l"),
    ],
    ids=["parts of names", "modules to save", "feedforward modules"],
)
def test_lists_of_very_many_names_take_little_time(
    config: dict[str, Any], message: str, layout: BaseLayout, patience: Callable[[], Any]
) -> None:
    is_ia3 = "peft_type" in config
    parameters = (
        {"ia3_l": (36, 1)} if is_ia3 else {"lora_A.weight": (1, 36), "lora_B.weight": (36, 1)}
    )
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.{name}": torch.ones(shape)
        for layer in range(3 if "modules_to_save" in config else 3000)
        for name, shape in parameters.items()
    }
    with patience(), pytest.raises(InvalidAdapterError, match=message):
        read(
            {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config} if not is_ia3 else config,
            tensors,
            layout,
        )


def bombs() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Of files that are within the limits."""
    shapes = {"prompt_embeddings": [4096, 36]}
    how = {"bits": 1, "group_size": 1 << 40, "shapes": shapes}
    return {
        "a seed for all numbers": unilora(96),
        "a seed and a vector": vera(96),
        "a bit for each": (
            {
                "peft_type": "PROMPT_TUNING",
                "num_virtual_tokens": 4096,
                "token_dim": 36,
                quantized.QUANTIZATION: how,
            },
            {
                "prompt_embeddings": torch.zeros(4096 * 36 // 8, dtype=torch.uint8),
                "prompt_embeddings.polydelta_scale": torch.ones(1),
            },
        ),
        "a product as large as the layer": (
            {"peft_type": "LOKR", "r": 1, "alpha": 1},
            {
                f"{Q}.lokr_w1_a": torch.ones(36, 1),
                f"{Q}.lokr_w1_b": torch.ones(1, 36),
                f"{Q}.lokr_w2": torch.ones(1, 1),
            },
        ),
        "a number that is spread over many": (
            {
                "peft_type": "WAVEFT",
                "random_loc_seed": 1,
                "scaling": 1,
                "wavelet_family": "coif4",
            },
            {f"{Q}.waveft_spectrum": torch.ones(9)},
        ),
        "rows of one number": ({"peft_type": "C3A"}, {f"{Q}.c3a_kernel": torch.ones(36, 36, 1)}),
    }


@pytest.mark.parametrize("name", bombs())
def test_an_upload_that_becomes_more_than_the_largest_file_is_refused(
    name: str, write: Write, layout: BaseLayout
) -> None:
    folder = write(*bombs()[name])
    size = sum(path.stat().st_size for path in folder.iterdir())
    least = UploadLimits(max_file_bytes=2 * size)
    check_outline(folder, least)
    with pytest.raises(TooLargeError, match=r"becomes \d+ numbers when it is read, and .* up to"):
        check_growth(folder, layout, least)
    check_growth(folder, layout, UploadLimits())


def test_an_upload_of_plain_numbers_may_be_as_large_as_its_limit(
    write: Write, layout: BaseLayout
) -> None:
    config, tensors = lora(36)
    folder = write(config, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    # B's rows have 36 numbers, A's as many.
    check_growth(folder, layout, UploadLimits(max_file_bytes=2 * 36 * (36 + 12)))
    with pytest.raises(TooLargeError):
        check_growth(folder, layout, UploadLimits(max_file_bytes=2 * 36 * (36 + 12) - 2))


def test_a_rank_beyond_all_floats_is_refused(layout: BaseLayout) -> None:
    config = json.loads('{"peft_type": "RANDLORA", "randlora_alpha": 1, "r": 1' + "0" * 400 + "}")
    with pytest.raises(InvalidAdapterError, match="r is 1000"):
        read(config, {}, layout)
