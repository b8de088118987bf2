"""PEFT's WaveFT: trained numbers at random places of `dW`, or of its wavelet transform.

The file has no places: a seed and the layer's shape give them. A coefficient of a wavelet with f
taps is spread over f x f entries, so with `use_idwt` the change is sparse too, but denser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Sparse
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.csr import sparse_from_entries, sparse_from_matrix
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.random_places import RandomPlaces
from polydelta.adapters_store.formats.peft.wavelets import FILTERS, reconstruct
from polydelta.adapters_store.formats.peft_config import Config, flag, key_rules, number
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, one_of, seed
from polydelta.adapters_store.formats.peft_tensors import Parameters

_SPECTRUM = "waveft_spectrum"


@dataclass(frozen=True)
class _Settings:
    places: RandomPlaces
    scaling: float
    # None: the numbers are the change itself.
    wavelet: str | None


def _settings(config: Config) -> _Settings:
    wavelet = None
    if flag("use_idwt", config.get("use_idwt", True)):
        wavelet = one_of("wavelet_family", config.get("wavelet_family", "db1"), tuple(FILTERS))
    places = RandomPlaces(seed("random_loc_seed", config.get("random_loc_seed")))
    return _Settings(places, number("scaling", config.get("scaling")), wavelet)


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    (count,) = shapes.dimensions(_SPECTRUM, 1)
    spread = 1 if settings.wavelet is None else len(FILTERS[settings.wavelet]) ** 2
    return ModuleOutline(Sparse.kind, 0, numbers=count * spread)


def _read(settings: _Settings, module: ModuleTensors) -> tuple[Sparse]:
    shape = (module.out_features, module.in_features)
    values = module[_SPECTRUM]
    if len(values) > math.prod(shape):
        raise InvalidAdapterError(
            f"The {_SPECTRUM} of {module.module!r} has {len(values)} numbers, but the base model's "
            f"layer has {math.prod(shape)} weights: the adapter was trained on another base."
        )
    places = settings.places(math.prod(shape), len(values))
    entries = torch.stack((places // shape[1], places % shape[1]))
    if settings.wavelet is not None:
        change = _inverse(entries, values, shape, settings.wavelet)
        return (sparse_from_matrix(change.mul_(settings.scaling)),)
    name = f"{module.module}.{_SPECTRUM}"
    return (sparse_from_entries(name, entries, values * settings.scaling, shape),)


def _inverse(entries: Tensor, values: Tensor, shape: tuple[int, int], wavelet: str) -> Tensor:
    """entries: [2, n]. The change, `[out, in]`, of which these are the wavelet coefficients."""
    margin = len(FILTERS[wavelet]) - 2
    # The transform takes even sizes, and gives `margin` less.
    rows, columns = (size + margin + size % 2 for size in shape)
    half = torch.tensor([[rows // 2], [columns // 2]])
    entries = entries + margin // 2
    # PEFT's upper right quarter is high-pass along the rows' axis, and its lower left along the
    # columns': they change places.
    entries = (entries // half).flip(0) * half + entries % half
    coefficients = torch.zeros(rows, columns)
    coefficients[*entries] = values
    return reconstruct(coefficients, wavelet)[: shape[0], : shape[1]]


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"random_loc_seed", "scaling", "use_idwt", "wavelet_family"},
        harmless={
            "init_weights",
            # How many numbers a module has; its tensor says it.
            "n_frequency",
            "n_frequency_pattern",
            "proportional_parameters",
        },
    ),
    parameters=Parameters((_SPECTRUM,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
