"""PEFT's FourierFT (arXiv:2405.03003): `dW = scaling * Re(ifft2(S))`, where S is zero but at random
places.

The file has the values at these places; the places themselves follow from the seed and the layer's
shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.random_places import RandomPlaces
from polydelta.adapters_store.formats.peft_config import Config, key_rules, number
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, seed
from polydelta.adapters_store.formats.peft_tensors import Parameters

_SPECTRUM = "fourierft_spectrum"


@dataclass(frozen=True)
class _Settings:
    scaling: float
    # Of the frequencies, counted row by row.
    places: RandomPlaces


def _settings(config: Config) -> _Settings:
    return _Settings(
        number("scaling", config.get("scaling")),
        RandomPlaces(seed("random_loc_seed", config.get("random_loc_seed"))),
    )


def _outline(_: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    shapes.dimensions(_SPECTRUM, 1)
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
    spectrum[settings.places(math.prod(shape), len(values))] = values
    return (Dense(torch.fft.ifft2(spectrum.view(shape)).real * settings.scaling),)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"random_loc_seed", "scaling"},
        # How many frequencies there are, the tensors say.
        harmless={"init_weights", "n_frequency", "n_frequency_pattern"},
    ),
    parameters=Parameters(required=(_SPECTRUM,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
