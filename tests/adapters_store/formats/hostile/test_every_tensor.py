"""Files that lack a tensor, or have one of another shape or of another base: of every format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import FORMATS
from polydelta.adapters_store.formats.modules import Modules, read_modules

# Any number of these may have been trained.
ANY_LENGTH = ("fourierft_spectrum", "waveft_spectrum")
# Where it was the only tensor, and where shared ones are left for which there is no module.
NOTHING, UNUSED = "changes no module", "cannot be served"


def test_without_one_of_its_tensors_a_module_is_refused_or_not_there(
    sound_adapters: Mapping[str, Any], hostile_layout: BaseLayout
) -> None:
    wrong: list[str] = []
    for name, sound in sound_adapters.items():
        whole = read(name, sound.config, sound.tensors, hostile_layout)
        assert not isinstance(whole, str)
        for missing in sound.tensors:
            rest = {key: tensor for key, tensor in sound.tensors.items() if key != missing}
            found = read(name, sound.config, rest, hostile_layout)
            if isinstance(found, str):
                is_right = is_named(missing, found) or NOTHING in found or UNUSED in found
            else:
                is_right = is_part(found, whole)
            if not is_right:
                wrong.append(f"{name} without {missing}: {found}")
    assert not wrong


def is_named(tensor: str, message: str) -> bool:
    """By what comes after its module."""
    of_module = re.fullmatch(r"base_model\.model\.model\.layers\.\d+\.\w+\.\w+\.(.+)", tensor)
    parts = [of_module[1]] if of_module else tensor.removeprefix("base_model.").split(".")
    return any(part in message for part in parts)


def test_a_tensor_of_another_shape_is_refused(
    sound_adapters: Mapping[str, Any], hostile_layout: BaseLayout
) -> None:
    wrong: list[str] = []
    for name, sound in sound_adapters.items():
        whole = read(name, sound.config, sound.tensors, hostile_layout)
        assert not isinstance(whole, str)
        for changed, tensor in sound.tensors.items():
            for other in misshapen(tensor):
                found = read(name, sound.config, {**sound.tensors, changed: other}, hostile_layout)
                if isinstance(found, str) or is_part(found, whole):
                    continue
                if not (changed.endswith(ANY_LENGTH) and other.ndim == 1):
                    wrong.append(f"{name}: {changed} {list(tensor.shape)} as {list(other.shape)}")
    assert not wrong


def test_modules_of_another_base_are_refused(
    sound_adapters: Mapping[str, Any], hostile_layout: BaseLayout
) -> None:
    for name, sound in sound_adapters.items():
        elsewhere = {
            key.replace("layers.1.", "layers.9."): value for key, value in sound.tensors.items()
        }
        if elsewhere.keys() != sound.tensors.keys():
            found = read(name, sound.config, elsewhere, hostile_layout)
            assert isinstance(found, str), name


def read(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: BaseLayout
) -> Modules | str:
    """Why it is refused, where it is."""
    try:
        return read_modules(FORMATS[name.split()[0]], config, tensors, layout)
    except InvalidAdapterError as error:
        return str(error)


def misshapen(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor.flatten()[0]
    yield tensor.unsqueeze(0)
    yield tensor.unsqueeze(-1)
    yield tensor.flatten()[:-1]
    for axis in range(tensor.ndim):
        yield torch.cat((tensor, tensor), axis)
        yield tensor.narrow(axis, 0, 0)
        yield tensor.narrow(axis, 0, tensor.shape[axis] - 1)


def is_part(found: Modules, whole: Modules) -> bool:
    """Whether what is found of each module is in the whole, too."""
    return all(
        any(is_same(delta, other) for other in whole.get(module, ()))
        for module, deltas in found.items()
        for delta in deltas
    )


def is_same(delta: Delta, other: Delta) -> bool:
    return type(delta) is type(other) and all(
        torch.equal(value, getattr(other, field.name))
        if isinstance(value := getattr(delta, field.name), Tensor)
        else value == getattr(other, field.name)
        for field in fields(delta)
    )
