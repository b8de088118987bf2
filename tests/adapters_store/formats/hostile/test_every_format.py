"""What holds for every format that is read, shown on one sound adapter of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import FORMATS
from polydelta.adapters_store.formats.modules import outline_adapter, read_modules

Read = Callable[[Mapping[str, Any], Mapping[str, Tensor]], Adapter]

# What is on, though some of it is false in Python.
ON: tuple[Any, ...] = (True, 1, 0, 0.0, "", "none", [0], [[]], {"a": {}})
SURPLUS = (
    "magic",
    "base_model.magic",
    "base_model.magic_A.0",
    "base_model.model.model.layers.1.self_attn.q_proj.magic",
    "base_model.model.model.layers.1.self_attn.q_proj.lora_A.magic.weight",
    "base_model.model.model.layers.1.mlp.magic.weight",
)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_every_format_has_a_sound_adapter(sound_adapters: Mapping[str, Any], read: Read) -> None:
    assert {name.split()[0] for name in sound_adapters} == FORMATS.keys()
    for name, sound in sound_adapters.items():
        assert read(sound.config, sound.tensors).format == name.split()[0]


def test_a_key_that_nobody_knows_is_refused_by_name(sound_adapters: Mapping[str, Any]) -> None:
    for sound in sound_adapters.values():
        for value in ON:
            with pytest.raises(InvalidAdapterError, match=r"use_magic is .* not known here"):
                outline_adapter({**sound.config, "use_magic": value}, shapes_of(sound.tensors))


def test_a_tensor_that_nobody_uses_is_refused_by_name(
    sound_adapters: Mapping[str, Any], hostile_layout: BaseLayout
) -> None:
    for name, sound in sound_adapters.items():
        for surplus in SURPLUS:
            tensors = {**sound.tensors, surplus: torch.zeros(2, 2)}
            with pytest.raises(InvalidAdapterError, match="magic"):
                outline_adapter(sound.config, shapes_of(tensors))
            with pytest.raises(InvalidAdapterError, match="magic"):
                read_modules(FORMATS[name.split()[0]], sound.config, tensors, hostile_layout)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_refused_wherever_it_is(
    value: float, sound_adapters: Mapping[str, Any], read: Read
) -> None:
    for sound in sound_adapters.values():
        for changed in with_one_entry(sound.tensors, value, lambda t: t.is_floating_point()):
            with pytest.raises(InvalidAdapterError, match="has NaN or infinite values"):
                read(sound.config, changed)


@pytest.mark.parametrize("value", [-1, -(2**31), 40 * 52 + 1, 2**31 - 1])
def test_an_index_outside_of_the_layer_is_refused(
    value: int, sound_adapters: Mapping[str, Any], read: Read
) -> None:
    indexed = 0
    for sound in sound_adapters.values():
        # Bytes are packed signs.
        is_index: Callable[[Tensor], bool] = lambda t: t.dtype in (torch.int32, torch.int64)  # noqa: E731
        for changed in with_one_entry(sound.tensors, value, is_index):
            indexed += 1
            with pytest.raises(InvalidAdapterError):
                read(sound.config, changed)
    assert indexed >= 8


def test_neither_the_base_nor_the_file_s_tensors_are_written_to(
    sound_adapters: Mapping[str, Any], hostile_layout: BaseLayout, hostile_model: Any
) -> None:
    weights = hostile_model.state_dict()
    before = {name: weight.clone() for name, weight in weights.items()}
    weight = hostile_layout.weight("model.norm")
    assert weight.data_ptr() == weights["model.norm.weight"].data_ptr(), "a copy proves nothing"
    for name, sound in sound_adapters.items():
        given = {key: tensor.clone() for key, tensor in sound.tensors.items()}
        read_modules(FORMATS[name.split()[0]], sound.config, given, hostile_layout)
        for key, tensor in given.items():
            assert torch.equal(tensor, sound.tensors[key]), f"{name}: {key}"
        for key, weight in weights.items():
            assert torch.equal(weight, before[key]), f"{name}: {key}"


def with_one_entry(
    tensors: Mapping[str, Tensor], value: float, wanted: Callable[[Tensor], bool]
) -> Iterator[dict[str, Tensor]]:
    """Each of the tensors that are wanted, with its last entry changed."""
    for name, tensor in tensors.items():
        if wanted(tensor) and tensor.numel():
            changed = tensor.clone()
            changed.view(-1)[-1] = value
            yield {**tensors, name: changed}
