"""Quantised storage: what is read back, how near it is, and what damage is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polydelta.adapters_store.delta import LowRank, Sparse
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.adapter_folder import write_folder
from polydelta.adapters_store.formats.quantized import (
    QUANTIZATION,
    SCALE_SUFFIX,
    dequantised,
    packed_codes,
    plain_shapes,
    unpacked_codes,
)
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.quantizing import quantize
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE, AdapterRef

BITS = (8, 4, 1)
LEVEL = {8: 127, 4: 7, 1: 1}
CONFIG = {"peft_type": "LORA", "r": 3}


def round_trip(
    tensors: Mapping[str, Tensor], bits: int, group_size: int = 64
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is stored, and what is read of it."""
    config, stored = quantize(CONFIG, tensors, bits, group_size)
    plain_config, plain = dequantised(json.loads(json.dumps(config)), stored)
    assert plain_config == CONFIG
    assert plain.keys() == tensors.keys()
    return stored, dict(plain)


def groups(tensor: Tensor, size: int) -> list[Tensor]:
    return list(tensor.flatten().split(size))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 255])
def test_codes_are_unpacked_as_they_were_packed(bits: int, count: int) -> None:
    level = LEVEL[bits]
    codes = torch.randint(-level, level + 1, (count,)).float()
    if bits == 1:
        codes = codes.sign() + (codes == 0)
    packed = packed_codes(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpacked_codes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(8, 64), (3, 257), (577, 1), (5, 7, 31), (1, 641), (23, 23)])
@pytest.mark.parametrize("group_size", [1, 5, 64, 10_000])
def test_a_tensor_is_read_back_within_half_a_step(
    bits: int, shape: tuple[int, ...], group_size: int
) -> None:
    tensor = torch.randn(shape) * torch.logspace(-6, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    stored, plain = round_trip({"w": tensor}, bits, group_size)
    assert plain["w"].shape == shape
    assert plain["w"].dtype == torch.float32
    scales = stored[f"w{SCALE_SUFFIX}"]
    assert scales.shape == (-(-tensor.numel() // group_size),)
    for got, want, scale in zip(
        groups(plain["w"], group_size), groups(tensor, group_size), scales.tolist(), strict=True
    ):
        if bits == 1:
            assert scale == pytest.approx(float(want.abs().mean()), rel=2**-8)
            assert torch.equal(got, torch.where(want >= 0, scale, -scale))
            continue
        # No worse than rounding to steps that hold the group's largest number, a bfloat16 each.
        step = float(want.abs().max()) / LEVEL[bits] * (1 + 2**-7)
        assert float((got - want).norm()) <= step / 2 * len(want) ** 0.5


def test_four_bits_clip_where_that_loses_less() -> None:
    outlier = torch.cat((torch.randn(6399) * 0.5, torch.tensor([6.0]))).view(100, 64)
    stored, _ = round_trip({"w": outlier}, 4, 64)
    assert float(stored[f"w{SCALE_SUFFIX}"].float()[:-1].mul(7).max()) <= float(outlier.abs().max())
    whole = outlier.view(100, 64).abs().amax(1) / 7
    assert (stored[f"w{SCALE_SUFFIX}"].float() < 0.9 * whole).any()


def test_zeros_and_tiny_and_huge_numbers_survive() -> None:
    tensor = torch.zeros(4, 256)
    tensor[1] = 1e-30
    tensor[2] = -1e38
    tensor[3, 0] = 1.0
    for bits in (8, 4):
        _, plain = round_trip({"w": tensor}, bits)
        torch.testing.assert_close(plain["w"], tensor, rtol=0.01, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_small_or_no_matrix_or_no_float_stays_as_it_is(bits: int) -> None:
    kept = {
        "small": torch.randn(7, 11),
        "magnitude_vector": torch.randn(5000).half(),
        "indices": torch.arange(8000, dtype=torch.int32).view(2, -1),
        "eight_bits": torch.randn(64, 64).to(torch.float8_e4m3fn),
        "nothing": torch.empty(0, 600),
    }
    if bits < 8:
        del kept["eight_bits"]
    stored, plain = round_trip({**kept, "w": torch.randn(64, 64).bfloat16()}, bits)
    assert set(stored) == {*kept, "w", f"w{SCALE_SUFFIX}"}
    assert stored["w"].dtype == (torch.int8 if bits == 8 else torch.uint8)
    for name, tensor in kept.items():
        for found in (stored[name], plain[name]):
            assert found.dtype == tensor.dtype
            assert torch.equal(found.float(), tensor.float())


def test_lists_of_a_changes_entries_are_quantised_though_they_are_vectors() -> None:
    stored, plain = round_trip({"m.shira_weight": torch.randn(2000)}, 8)
    assert stored["m.shira_weight"].dtype == torch.int8
    assert plain["m.shira_weight"].shape == (2000,)


def test_an_adapter_can_be_quantised_a_second_time() -> None:
    tensor = torch.randn(30, 40)
    config, stored = quantize(CONFIG, {"w": tensor}, 8, 64)
    again, smaller = quantize(*dequantised(config, stored), 4, 32)
    assert again[QUANTIZATION]["bits"] == 4
    assert len(smaller["w"]) == 600
    assert (dequantised(again, smaller)[1]["w"] - tensor).norm() < 0.2 * tensor.norm()


def test_an_adapter_without_anything_to_quantise_is_refused() -> None:
    with pytest.raises(InvalidAdapterError, match=r"no matrix of 512 numbers or more"):
        quantize(CONFIG, {"w": torch.randn(511), "v": torch.randn(5, 5)}, 8, 64)


def test_numbers_that_are_not_finite_are_refused() -> None:
    tensor = torch.randn(64, 64)
    tensor[5, 5] = torch.nan
    with pytest.raises(InvalidAdapterError, match="NaN or infinite"):
        quantize(CONFIG, {"w": tensor}, 4, 64)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (16, 64), (8, 0)])
def test_bits_and_group_sizes_that_are_not_stored_are_refused(bits: int, group_size: int) -> None:
    with pytest.raises(InvalidAdapterError, match="take"):
        quantize(CONFIG, {"w": torch.randn(64, 64)}, bits, group_size)


def test_a_config_that_would_be_too_large_to_read_is_refused() -> None:
    tensors = {f"{'x' * 200}.{number}": torch.randn(2, 256) for number in range(5000)}
    with pytest.raises(InvalidAdapterError, match="5000 tensors make the config larger"):
        quantize(CONFIG, tensors, 8, 64)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_lora_and_shira_are_read_as_their_formats(
    bits: int, adapter_files, tmp_path: Path
) -> None:
    module = "model.layers.1.mlp.up_proj"
    prefix = f"base_model.model.{module}"
    lora = {
        f"{prefix}.lora_A.weight": torch.randn(16, 36),
        f"{prefix}.lora_B.weight": torch.randn(52, 16),
    }
    places = torch.randperm(52 * 36)[:600].sort().values
    shira = {
        f"{prefix}.shira_weight": torch.randn(600),
        f"{prefix}.shira_indices": torch.stack((places // 36, places % 36)).int(),
    }
    for name, tensors, config in (
        ("lora", lora, {"peft_type": "LORA", "r": 16, "lora_alpha": 32}),
        ("shira", shira, {"peft_type": "SHIRA", "r": 1}),
    ):
        write_folder(tmp_path / f"{name}-q", *quantize(config, tensors, bits, 64))
        summary = inspect(tmp_path / f"{name}-q", adapter_files.layout)
        assert summary.problem is None
        read = adapter_files.read(tmp_path / f"{name}-q")
        assert read.format == name.upper() == summary.format
        (delta,) = read.modules[module]
        _, plain = dequantised(*quantize(config, tensors, bits, 64))
        if isinstance(delta, LowRank):
            assert summary.ranks == (16,)
            assert torch.equal(delta.a, plain[f"{prefix}.lora_A.weight"])
            assert torch.equal(delta.b, plain[f"{prefix}.lora_B.weight"] * 2)
        else:
            assert isinstance(delta, Sparse)
            assert torch.equal(delta.values, plain[f"{prefix}.shira_weight"])


@pytest.fixture
def stored(tmp_path: Path, make_lora_tensors: Callable[..., dict[str, Tensor]]) -> Path:
    """A LoRA in 4 bits, whose files tests damage."""
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
    write_folder(tmp_path / "q", *quantize(config, make_lora_tensors(rank=16), 4, 64))
    return tmp_path / "q"


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "bits": (lambda q: q.update(bits=2), r"polydelta_quantization\.bits is 2, but must be 8, 4 or"),
    "bits of another kind": (lambda q: q.update(bits="4"), r"\.bits is '4'"),
    "true": (lambda q: q.update(bits=True), r"\.bits is True"),
    "a list for bits": (lambda q: q.update(bits=[4]), r"\.bits is \[4\]"),
    "group size": (lambda q: q.update(group_size=0), r"\.group_size is 0"),
    "huge group size": (lambda q: q.update(group_size=10**30), r"\.group_size is 1000"),
    "an unknown key": (lambda q: q.update(zero_point=3), r"the keys \[.*zero_point"),
    "a missing key": (lambda q: q.pop("shapes"), "must have bits, group_size and shapes"),
    "no object": (lambda q: q.update(shapes=[1]), r"polydelta_quantization\.shapes is \[1\]"),
    "a shape": (lambda q: q["shapes"].update({NAME: 576}), r"is 576, but must be a list of sizes"),
    "a negative size": (lambda q: q["shapes"].update({NAME: [-16, -36]}), "a list of sizes"),
    "a broken size": (lambda q: q["shapes"].update({NAME: [16.0, 36]}), "a list of sizes"),
    "too many sizes": (lambda q: q["shapes"].update({NAME: [1] * 9}), "a list of sizes"),
    "a huge shape": (lambda q: q["shapes"].update({NAME: [1 << 48, 1 << 48]}), "a list of sizes"),
    "another shape": (lambda q: q["shapes"].update({NAME: [16, 37]}), r"has shape \[288\]"),
    "a foreign name": (lambda q: q["shapes"].update(other=[16, 36]), "tells of a tensor 'other'"),
    "a tensor left out": (lambda q: q["shapes"].pop(NAME), r"Tensor .*lora_A"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_config_that_does_not_fit_is_refused_with_and_without_the_numbers(
    damage: str, stored: Path, adapter_files
) -> None:
    change, message = DAMAGES[damage]
    config = json.loads((stored / CONFIG_FILE).read_text())
    change(config[QUANTIZATION])
    (stored / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InvalidAdapterError, match=message):
        adapter_files.read(stored)
    problem = inspect(stored).problem
    assert problem is not None
    with pytest.raises(InvalidAdapterError, match=message):
        raise InvalidAdapterError(problem)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (NAME, torch.zeros(288, dtype=torch.int8), "is torch.int8, but codes of 4 bits are"),
        (f"{NAME}{SCALE_SUFFIX}", torch.ones(8, dtype=torch.bfloat16), r"asks for \[9\]"),
        (f"{NAME}{SCALE_SUFFIX}", torch.ones(9, dtype=torch.int32), "must be floating-point"),
        (f"{NAME}{SCALE_SUFFIX}", torch.full((9,), torch.inf), "NaN or infinite"),
        (f"{NAME}{SCALE_SUFFIX}", None, "not in the file"),
        ("other.polydelta_scale", torch.ones(9), "other"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(
    name: str, tensor: Tensor | None, message: str, stored: Path, adapter_files
) -> None:
    tensors = load_file(stored / WEIGHTS_FILE)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, stored / WEIGHTS_FILE)
    with pytest.raises(InvalidAdapterError, match=message):
        adapter_files.read(stored)


def test_an_adapter_that_unpacks_to_far_more_than_the_base_has_is_refused(adapter_files) -> None:
    tensors = {
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": torch.randn(9000, 36),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": torch.randn(36, 9000),
    }
    config = {"peft_type": "LORA", "r": 9000, "lora_alpha": 1}
    write_folder(adapter_files.root / "bomb", *quantize(config, tensors, 1, 64))
    with pytest.raises(InvalidAdapterError, match="unpacks to 648000 numbers, far more than"):
        adapter_files.read(adapter_files.root / "bomb")


def test_plain_adapters_pass_through_untouched() -> None:
    config, tensors = copy.copy(CONFIG), {"w": torch.randn(3)}
    assert dequantised(config, tensors, 1) == (config, tensors)
    assert plain_shapes(config, {"w": (3,)}) == (config, {"w": (3,)})


def test_a_changed_bit_is_another_version(stored: Path, adapter_files) -> None:
    before = read_adapter(AdapterRef("q", 1, stored), adapter_files.layout).digest
    tensors = load_file(stored / WEIGHTS_FILE)
    tensors[NAME] ^= 1
    save_file(tensors, stored / WEIGHTS_FILE)
    assert read_adapter(AdapterRef("q", 1, stored), adapter_files.layout).digest != before
