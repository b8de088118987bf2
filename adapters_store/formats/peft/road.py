"""PEFT's RoAd (arXiv:2409.00119): pairs of a layer's outputs, bias included, are rotated by an
angle theta and scaled by alpha.

Outputs are grouped, and each is paired with the one half a group away. The variants differ in how
many angles there are: road_1 has one a pair, road_2 one for each of the pair, road_4 two for each.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Rotate
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, one_of
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_THETA, _ALPHA = "road_theta", "road_alpha"
# Variant -> how many angles there are for each half a group of outputs.
_ANGLES = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(frozen=True)
class _Settings:
    group_size: int
    angles: int


def _settings(config: Config) -> _Settings:
    variant = one_of("variant", config.get("variant", "road_1"), tuple(_ANGLES))
    group_size = positive_int("group_size", config.get("group_size"))
    if group_size % 2:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: group_size is {reprlib.repr(group_size)}, but must be even: each "
            "output of a group's first half is paired with one of its second."
        )
    return _Settings(group_size, _ANGLES[variant])


def _outline(_: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    shapes.check(_ALPHA, shapes[_THETA], f"its {_THETA}")
    return ModuleOutline(Rotate.kind, 0)


def _read(settings: _Settings, module: ModuleTensors) -> tuple[Rotate]:
    out_features, group_size, angles = module.out_features, settings.group_size, settings.angles
    if out_features % group_size:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: group_size is {reprlib.repr(group_size)}, which does not divide the "
            f"{out_features} outputs of {module.module!r}: the adapter was trained on another base."
        )
    module.check(_THETA, (out_features // 2 * angles,))
    half = group_size // 2
    theta, alpha = _angles(module[_THETA], angles, half), _angles(module[_ALPHA], angles, half)
    # [groups, 2 (first and second of a pair), half]: the first takes from the second with a minus.
    cos = alpha[:, 0] * theta[:, 0].cos()
    sin = alpha[:, 1] * theta[:, 1].sin() * torch.tensor([-1.0, 1.0]).unsqueeze(1)
    partner = torch.arange(out_features, dtype=torch.int32).view(-1, 2, half).flip(1)
    return (Rotate(cos.flatten(), sin.flatten(), partner.flatten()),)


def _angles(vector: Tensor, angles: int, half: int) -> Tensor:
    """[groups, 2 (in cos, in sin), 2 (first and second of a pair), half]."""
    match angles:
        case 1:
            return vector.view(-1, 1, 1, half).expand(-1, 2, 2, half)
        case 2:
            return vector.view(-1, 1, 2, half).expand(-1, 2, 2, half)
        case _:
            return vector.view(-1, 2, 2, half)


FORMAT = PeftFormat(
    rules=key_rules(honoured={"group_size", "variant"}, harmless={"init_weights"}),
    parameters=Parameters((_THETA, _ALPHA)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
