"""PEFT's OFT (arXiv:2306.07280; its Cayley-Neumann series: OFTv2, arXiv:2506.19847): the layer's
input is rotated, block by block.

`y = W (x R) + b` with R block-diagonal, so `dW = W R^T - W`. Each block of R is the Cayley
transform of a skew-symmetric matrix, of which the file has the upper triangle.
"""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.rotations import cayley, cayley_series, skew_symmetric
from polydelta.adapters_store.formats.peft_config import (
    Config,
    flag,
    key_rules,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_R = "oft_R.weight"
# PEFT's default is 5.
_MAX_TERMS = 128


@dataclass(frozen=True)
class _Settings:
    block_share: bool
    # How long a block's skew-symmetric matrix may be, times the root of their number (COFT).
    limit: float | None
    # Of the series in place of the inverse; None for the inverse.
    terms: int | None


def _settings(config: Config) -> _Settings:
    constrained = flag("coft", config.get("coft"))
    series = flag("use_cayley_neumann", config.get("use_cayley_neumann", True))
    return _Settings(
        flag("block_share", config.get("block_share")),
        number("eps", config.get("eps")) if constrained else None,
        _series_terms(config) if series else None,
    )


def _series_terms(config: Config) -> int:
    key = "num_cayley_neumann_terms"
    terms = positive_int(key, config.get(key))
    if terms > _MAX_TERMS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {key} is {reprlib.repr(terms)}, more than {_MAX_TERMS}: train it with "
            "use_cayley_neumann=False, which is exact."
        )
    version = config.get("peft_version")
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    if found is None or (int(found[1]), int(found[2])) < (0, 18):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: peft_version is {reprlib.repr(version)}; before PEFT 0.18.0, "
            "use_cayley_neumann meant another series, so the rotations would be wrong: train it "
            "again with a newer PEFT, or with use_cayley_neumann=False."
        )
    return terms


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    blocks, entries = shapes.dimensions(_R, 2)
    size = _block_size(entries)
    shapes.check(_R, (blocks, size * (size - 1) // 2), "a triangle of each block")
    if settings.block_share:
        shapes.check(_R, (1, entries), "block_share")
    return ModuleOutline(Dense.kind, 0)


def _read(settings: _Settings, module: ModuleTensors) -> tuple[Dense]:
    blocks, entries = module.shapes[_R]
    size = _block_size(entries)
    repeats = module.in_features // size if settings.block_share else 1
    if blocks * repeats * size != module.in_features:
        raise InvalidAdapterError(
            f"Module {module.module!r} is rotated in {blocks} blocks of {size}, but the base "
            f"model's layer has {module.in_features} inputs: load it over the base that it was "
            "trained on."
        )
    skew = skew_symmetric(module[_R], size)
    if settings.limit is not None:
        skew = _constrained(skew, settings.limit / math.sqrt(blocks))
    rotations = cayley(skew) if settings.terms is None else cayley_series(skew, settings.terms)
    weight = module.weight()
    # [out, blocks, size]
    parts = weight.view(module.out_features, -1, size)
    rotated = torch.einsum("obi,bji->obj", parts, rotations.repeat(repeats, 1, 1))
    return (Dense(rotated.reshape(weight.shape) - weight),)


def _constrained(skew: Tensor, limit: float) -> Tensor:
    """Each block pulled back to this norm, where it is larger."""
    norms = torch.linalg.matrix_norm(skew).view(-1, 1, 1)
    return torch.where(norms <= limit, skew, skew * (limit / norms))


def _block_size(entries: int) -> int:
    """Of a block whose upper triangle has so many entries; rounded down where none has."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={
            "block_share",
            "coft",
            "eps",
            "num_cayley_neumann_terms",
            "peft_version",
            "use_cayley_neumann",
        },
        # The blocks' number and size, as PEFT fits them to each layer, the tensors say.
        harmless={"init_weights", "module_dropout", "oft_block_size", "r"},
    ),
    parameters=Parameters(required=(_R,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
