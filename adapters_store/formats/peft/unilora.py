"""PEFT's Uni-LoRA (arXiv:2506.00799): a LoRA whose every number is one of a short vector that all
modules share, over the square root of how often it is taken.

Which one it is, is random. Unless `save_indices`, the file has the vector alone: which modules
there are then follows from the config and the base.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.targets import Targets
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
    flag,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import (
    linear_layers,
    seed,
)
from polydelta.adapters_store.formats.peft_tensors import Parameters, check_shape
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

_THETA = "base_model.unilora_theta_d"
_INDICES_A, _INDICES_B = "unilora_indices_A", "unilora_indices_B"
_SCALES_A, _SCALES_B = "unilora_scales_A", "unilora_scales_B"


@dataclass(frozen=True)
class _Settings:
    rank: int
    theta_length: int
    seed: int


def _settings(config: Config) -> _Settings:
    proj_seed = seed("proj_seed", config.get("proj_seed"))
    if proj_seed < 0:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: proj_seed is {proj_seed}, but must not be negative."
        )
    return _Settings(
        positive_int("r", config.get("r")),
        positive_int("theta_d_length", config.get("theta_d_length")),
        proj_seed,
    )


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank, length = settings.rank, settings.theta_length
    shapes.need(_THETA)
    shapes.check(_THETA, (length,), f"theta_d_length = {length} in {CONFIG_FILE}")
    for a, b in ((_INDICES_A, _INDICES_B), (_SCALES_A, _SCALES_B)):
        shapes.check(a, (rank, *shapes[a][1:2]), f"r = {rank} in {CONFIG_FILE}")
        shapes.check(b, (*shapes[b][:1], rank), f"r = {rank} in {CONFIG_FILE}")
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    rank, length = settings.rank, settings.theta_length
    for name_a, name_b in ((_INDICES_A, _INDICES_B), (_SCALES_A, _SCALES_B)):
        tensors.check(name_a, (rank, tensors.in_features))
        tensors.check(name_b, (tensors.out_features, rank))
    theta = tensors[_THETA]
    a, b = (
        theta[tensors.indices(indices, length)] * tensors[scales]
        for indices, scales in ((_INDICES_A, _SCALES_A), (_INDICES_B, _SCALES_B))
    )
    return (LowRank(a, b),)


_RULES = KeyRules(
    honoured=frozenset(
        {
            "layers_pattern",
            "layers_to_transform",
            "proj_seed",
            "r",
            "save_indices",
            "target_modules",
            "theta_d_length",
        }
    ),
    # Biases that were trained are read with the saved modules.
    harmless=COMMON_HARMLESS | {"bias", "init_theta_d_bound", "init_weights", "unilora_dropout"},
    refused=COMMON_REFUSED,
)

# With all tensors in the file.
_WHOLE = PeftFormat(
    rules=_RULES,
    parameters=Parameters((_INDICES_A, _INDICES_B, _SCALES_A, _SCALES_B), shared=(_THETA,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)


class UniLora:
    """The parser. Without `save_indices` its outline knows no modules, so it has the names that the
    config targets instead."""

    def outline(self, config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        if _saved(config):
            return _WHOLE.outline(config, shapes)
        _RULES.check(config)
        settings = _settings(config)
        if shapes.keys() != {_THETA}:
            raise InvalidAdapterError(
                f"{WEIGHTS_FILE} has {reprlib.repr(sorted(shapes))}, but as save_indices is false "
                f"in {CONFIG_FILE}, it should have {_THETA} alone: save the adapter again from the "
                "trained model."
            )
        length = settings.theta_length
        check_shape(_THETA, shapes[_THETA], (length,), f"theta_d_length in {CONFIG_FILE}")
        return dict.fromkeys(Targets(config).names, ModuleOutline(LowRank.kind, settings.rank))

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
    ) -> dict[str, tuple[Delta, ...]]:
        if not _saved(config):
            self.outline(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
            tensors = {**tensors, **_choices(_settings(config), Targets(config).shapes(layout))}
        return _WHOLE.read(config, tensors, layout)


def _saved(config: Config) -> bool:
    return flag("save_indices", config.get("save_indices"))


def _choices(settings: _Settings, modules: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """What PEFT draws for modules of these shapes: tensor name -> tensor. Scales are in float32;
    PEFT rounds them to the base's dtype."""
    shapes: dict[str, Shape] = {}
    for module, (out, in_) in modules.items():
        shapes[f"base_model.model.{module}.{_INDICES_A}"] = (settings.rank, in_)
        shapes[f"base_model.model.{module}.{_INDICES_B}"] = (out, settings.rank)
    sizes = [rows * columns for rows, columns in shapes.values()]
    drawn = _balanced(sum(sizes), settings.theta_length, settings.seed)
    # Where an index does not occur, its scale is not asked for.
    scales = drawn.bincount(minlength=settings.theta_length).float().rsqrt()
    choices: dict[str, Tensor] = {}
    for (name, shape), indices in zip(shapes.items(), drawn.split(sizes), strict=True):
        choices[name] = indices.view(shape)
        choices[name.replace(".unilora_indices_", ".unilora_scales_")] = scales[choices[name]]
    return choices


def _balanced(count: int, length: int, seed: int) -> Tensor:
    """[count] int64 in random order: each number below length equally often, as far as possible."""
    generator = np.random.default_rng(seed)
    drawn = np.repeat(np.arange(length), count // length)
    if rest := count % length:
        drawn = np.concatenate((drawn, generator.choice(length, size=rest, replace=False)))
    generator.shuffle(drawn)
    return torch.from_numpy(drawn)


FORMAT = UniLora()
