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
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.targets import Targets
from polydelta.adapters_store.formats.peft_config import Config, flag, key_rules, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, seed
from polydelta.adapters_store.formats.peft_tensors import Parameters, check_finite, check_shape
from polydelta.adapters_store.formats.ranks import check_rank, reduced
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
        shapes.check_factors(a, b, rank, f"r = {rank} in {CONFIG_FILE}")
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    rank, length = settings.rank, settings.theta_length
    tensors.check_factors(_INDICES_A, _INDICES_B, rank)
    tensors.check_factors(_SCALES_A, _SCALES_B, rank)
    theta = tensors[_THETA]
    a, b = (
        theta[tensors.indices(indices, length)] * tensors[scales]
        for indices, scales in ((_INDICES_A, _SCALES_A), (_INDICES_B, _SCALES_B))
    )
    return (LowRank(a, b),)


_RULES = key_rules(
    honoured={
        "layers_pattern",
        "layers_to_transform",
        "proj_seed",
        "r",
        "save_indices",
        "target_modules",
        "theta_d_length",
    },
    harmless={"init_theta_d_bound", "init_weights", "unilora_dropout"},
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
        if _saved(config):
            return _WHOLE.read(config, tensors, layout)
        self.outline(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        settings, targets = _settings(config), Targets(config).shapes(layout)
        for module, shape in targets.items():
            check_rank(module, settings.rank, shape)
        deltas = _drawn(settings, to_float32(_THETA, tensors[_THETA]), targets)
        for module, of_module in deltas.items():
            check_finite(module, of_module)
        return deltas


def _saved(config: Config) -> bool:
    return flag("save_indices", config.get("save_indices"))


def _drawn(
    settings: _Settings, theta: Tensor, modules: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Delta, ...]]:
    """The LoRAs that PEFT draws for modules of these shapes. Scales are in float32; PEFT rounds
    them to the base's dtype."""
    rank = settings.rank
    shapes = [shape for out, in_ in modules.values() for shape in ((rank, in_), (out, rank))]
    sizes = [rows * columns for rows, columns in shapes]
    drawn = _balanced(sum(sizes), settings.theta_length, settings.seed)
    # Where an index does not occur, its number, which is infinite, is not asked for.
    scaled = theta * drawn.bincount(minlength=settings.theta_length).float().rsqrt()
    parts = zip(drawn.split(sizes), shapes, strict=True)
    factors = (scaled[indices].view(shape) for indices, shape in parts)
    return {module: (reduced(LowRank(next(factors), next(factors))),) for module in modules}


def _balanced(count: int, length: int, seed: int) -> Tensor:
    """[count] int32 in random order: each number below length equally often, or nearly."""
    generator = np.random.default_rng(seed)
    drawn = torch.arange(length, dtype=torch.int32).repeat_interleave(count // length)
    if rest := count % length:
        others = generator.choice(length, size=rest, replace=False)
        drawn = torch.cat((drawn, torch.from_numpy(others).int()))
    # Of the tensor's own memory.
    generator.shuffle(drawn.numpy())
    return drawn


FORMAT = UniLora()
