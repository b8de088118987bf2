"""Changed adapters of every format: read, or refused with a reason; soon, and in little memory."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.packing import pack
from polydelta.adapters_store.reference import AdapterRef

Config = dict[str, Any]
Tensors = dict[str, Tensor]

# Of each adapter.
EXAMPLES = 50
# Times that tensors are changed to what a config asks for, and up to how many numbers.
OBLIGING, LARGEST = 6, 1 << 20

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    5,
    1024,
    2**20,
    2**31 - 1,
    2**40,
    -(2**63),
    10**400,
    0.5,
    -0.5,
    1e-30,
    1e308,
    float("nan"),
    "",
    "none",
    "(a+)+b",
    "x" * 3000,
    [],
    [0],
    [-(2**40)],
    [[[]]],
    ["q_proj"] * 3,
    {},
    {"": {}},
    {".*": 2**40},
    {"q_proj": -1},
    {"nblocks": 0},
)
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float64,
)
ODD_NUMBERS = (0.0, -1.0, 1e-45, 1e30, 3e38, float("nan"), float("inf"))


def change_value(rng: random.Random, value: Any) -> Any:
    """One place in a JSON value, however deep."""
    if isinstance(value, dict) and value and rng.random() < 0.7:
        key = rng.choice(list(value))
        return {**value, key: change_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return [*value[:at], change_value(rng, value[at]), *value[at + rng.randrange(2) :]]
    if type(value) is int and rng.random() < 0.4:
        return value + rng.choice((-value, 1, -1, 4, 2**31))
    return rng.choice(ODD_VALUES)


def change_config(rng: random.Random, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    key = rng.choice([*(key for key in config if key != "peft_type"), "bias"])
    if rng.random() < 0.1:
        return {name: value for name, value in config.items() if name != key}, tensors
    return {**config, key: change_value(rng, config.get(key))}, tensors


def change_dtype(rng: random.Random, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    name = rng.choice(list(tensors))
    return config, {**tensors, name: tensors[name].to(rng.choice(DTYPES))}


def change_shape(rng: random.Random, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    shapes: list[Callable[[], Tensor]] = [
        lambda: tensor.flatten()[:1].squeeze(),
        lambda: tensor.flatten()[:0],
        lambda: tensor.flatten(),
        lambda: tensor.unsqueeze(0),
        lambda: tensor.view(*([1] * (5 - tensor.dim())), *tensor.shape),
        lambda: tensor.transpose(0, -1) if tensor.dim() else tensor,
        lambda: tensor[:-1] if tensor.dim() else tensor,
        lambda: torch.cat((tensor, tensor)) if tensor.dim() else tensor,
        lambda: torch.cat((tensor, tensor), -1) if tensor.dim() else tensor,
        lambda: torch.zeros(*tensor.shape[:-1], 0),
        lambda: torch.zeros(0, *tensor.shape[1:]),
        lambda: torch.zeros(1, 1 << 20),
        lambda: torch.zeros(1 << 20, 1),
    ]
    return config, {**tensors, name: rng.choice(shapes)()}


def change_numbers(rng: random.Random, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    name = rng.choice(list(tensors))
    values = tensors[name].flatten()
    start = rng.choice((0, rng.randrange(len(values) + 1)))
    number = rng.choice(ODD_NUMBERS if values.is_floating_point() else (0, 1, 35, 127))
    odd = torch.full_like(values[start:], number, dtype=torch.float64).to(values.dtype)
    changed = torch.cat((values[:start], odd)).view(tensors[name].shape)
    return config, {**tensors, name: changed}


def change_names(rng: random.Random, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    names = (
        name.replace("layers.1", rng.choice(("layers.0", "layers.99", "layers.-1", "layers"))),
        name.replace("q_proj", rng.choice(("k_proj", "magic", "", "q_proj.q_proj"))),
        name.replace("model.layers.1.self_attn.q_proj", rng.choice(("lm_head", "model.norm"))),
        name.replace("model.layers.1.self_attn.q_proj", "model.embed_tokens"),
        name.rpartition(".")[0] + "." + other.rpartition(".")[2],
        name.replace("base_model.", "") or "x",
        f"{name}.0",
        name.rpartition(".")[2],
    )
    match rng.randrange(3):
        case 0 if rest:
            return config, rest
        case 1:
            return config, {**tensors, rng.choice(names): tensors[name].clone()}
        case _:
            return config, {**rest, rng.choice(names): tensors[name].clone()}


def with_wanted_shape(reason: str, tensors: Tensors) -> Tensors | None:
    """The tensor that a message is about, of the shape that it asks for; None without one."""
    found = re.match(r"Tensor '(.*)' has shape .* asks for (\[[\d, ]*\])", reason)
    if found is None or found[1] not in tensors:
        return None
    shape = json.loads(found[2])
    if math.prod(shape) > LARGEST:
        return None
    return {**tensors, found[1]: torch.ones(shape).to(tensors[found[1]].dtype)}


CHANGES = (
    change_config,
    change_config,
    change_config,
    change_dtype,
    change_shape,
    change_shape,
    change_numbers,
    change_names,
)


@pytest.mark.usefixtures("little_memory")
def test_a_changed_adapter_is_read_or_refused_with_a_reason(
    sound_adapters: Mapping[str, Any],
    hostile_layout: BaseLayout,
    write: Callable[[Config, Tensors], Path],
    patience: Callable[[], AbstractContextManager[None]],
) -> None:
    def attempt(config: Config, tensors: Tensors) -> str:
        """Why it is refused; an empty text when it is read."""
        folder = write(config, tensors)
        try:
            with patience():
                problem = inspect(folder).problem
                adapter = read_adapter(AdapterRef("hostile", 1, folder), hostile_layout)
                pack(adapter, hostile_layout, torch.bfloat16)
        except InvalidAdapterError as error:
            return str(error)
        # What the outline refuses, reading refuses too.
        assert problem is None
        return ""

    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    for name, sound in sound_adapters.items():
        rng = random.Random(name)
        for example in range(EXAMPLES):
            config, tensors = sound.config, sound.tensors
            changes = [rng.choice(CHANGES) for _ in range(rng.choice((1, 1, 2)))]
            for change in changes:
                config, tensors = change(rng, config, tensors)
            try:
                reason = attempt(config, tensors)
                # A file that follows its config gets further.
                for _ in range(OBLIGING):
                    obliging = with_wanted_shape(reason, tensors)
                    if obliging is None:
                        break
                    tensors = obliging
                    reason = attempt(config, tensors)
            except Exception as error:
                made = [change.__name__ for change in changes]
                failures.append(f"{name}, example {example} of {made}: {error!r:.200}")
            else:
                assert len(reason.encode()) < 1500, reason
                outcomes["refused" if reason else "read"] += 1
    assert not failures, "\n".join(failures)
    # Changes of options that are about training, and of numbers, are harmless.
    assert min(outcomes["read"], outcomes["refused"]) > outcomes.total() / 4
