"""PEFT's FourierFT (arXiv:2405.03003): `dW = scaling * Re(ifft2(S))`, where S is zero but at random
places.

The file has the values at these places; the places themselves follow from the seed and the layer's
shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
    number,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import (
    MODULE_CHOICE,
    linear_layers,
    seed,
)
from polydelta.adapters_store.formats.peft_shapes import dimensions
from polydelta.adapters_store.formats.peft_tensors import Parameters

_SPECTRUM = "fourierft_spectrum"


@dataclass(frozen=True)
class _Settings:
    scaling: float
    seed: int


def _settings(config: Config) -> _Settings:
    return _Settings(
        number("scaling", config.get("scaling")),
        seed("random_loc_seed", config.get("random_loc_seed")),
    )


def _outline(_: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    dimensions(shapes, _SPECTRUM, 1)
    return ModuleOutline(Dense.kind, 0)


def _read(settings: _Settings, module: ModuleTensors) -> tuple[Dense]:
    values = module[_SPECTRUM]
    shape = module.out_features, module.in_features
    if len(values) > math.prod(shape):
        raise InvalidAdapterError(
            f"Module {module.module!r} has {len(values)} frequencies, but the base model's layer "
            f"has {math.prod(shape)} weights: load it over the base that it was trained on."
        )
    spectrum = torch.zeros(math.prod(shape))
    spectrum[_places(math.prod(shape), settings.seed, len(values))] = values
    return (Dense(torch.fft.ifft2(spectrum.view(shape)).real * settings.scaling),)


# A shuffle of all of a large layer's places takes seconds, and all layers of a shape have the same.
@lru_cache(maxsize=16)
def _places(entries: int, seed: int, count: int) -> Tensor:
    """The first `count` of a layer's entries, shuffled, counted row by row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(entries, generator=generator)[:count].clone()


FORMAT = PeftFormat(
    rules=KeyRules(
        honoured=frozenset({"random_loc_seed", "scaling"}),
        # How many frequencies there are, the tensors say.
        harmless=COMMON_HARMLESS
        | MODULE_CHOICE
        | {"bias", "init_weights", "n_frequency", "n_frequency_pattern"},
        refused=COMMON_REFUSED,
    ),
    parameters=Parameters(required=(_SPECTRUM,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
