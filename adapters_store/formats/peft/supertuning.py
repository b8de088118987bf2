"""PEFT's Super-Tuning (arXiv:2607.09287): a sparse change at the entries of W that are largest, or
smallest, in magnitude; with `r`, a LoRA beside it."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Delta, LowRank, Sparse
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.csr import sparse_from_entries
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    Config,
    flag,
    key_rules,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, refuse_surplus
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_VALUES, _PLACES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


@dataclass(frozen=True)
class _Settings:
    # None: the file has the places.
    largest: _Largest | None
    # None: there is no LoRA.
    rank: int | None
    scale: float


@dataclass(frozen=True)
class _Largest:
    """How the places are found anew."""

    sparsity: float
    select_top: bool

    def __call__(self, module: ModuleTensors) -> Tensor:
        """As PEFT finds them, in the order of its values: [nnz], int64."""
        magnitudes = module.weight().abs().flatten()
        count = int(len(magnitudes) * (1 - self.sparsity))
        why = f"sparsity in {CONFIG_FILE} for the base model's layer"
        module.shapes.check(_VALUES, (count,), why)
        # One more than is wanted: it must differ from the last one.
        sought = min(count + 1, len(magnitudes))
        found = magnitudes.topk(sought, largest=self.select_top)
        if (found.values.diff() == 0).any():
            raise InvalidAdapterError(
                f"The base's weight of {module.module!r} has entries of the same magnitude, so "
                f"which of {_VALUES} belongs to which is not certain: save the adapter again with "
                "save_precomputed_indices=True."
            )
        return found.indices[:count]


def _settings(config: Config) -> _Settings:
    sparsity = number("sparsity", config.get("sparsity", 0.99))
    if not 0 <= sparsity < 1:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: sparsity is {sparsity}, but must be from 0 to below 1."
        )
    select_top = flag("select_top", config.get("select_top", True))
    saved = flag("save_precomputed_indices", config.get("save_precomputed_indices", True))
    largest = None if saved else _Largest(sparsity, select_top)
    alpha = config.get("lora_alpha")
    if config.get("r") is not None:
        rank = positive_int("r", config["r"])
        return _Settings(largest, rank, 2 if alpha is None else number("lora_alpha", alpha) / rank)
    if alpha is not None:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: lora_alpha is {reprlib.repr(alpha)} without an r: save the adapter "
            "again from the trained model."
        )
    return _Settings(largest, None, 1)


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    count = shapes.dimensions(_VALUES, 1)
    if settings.largest is None:
        shapes.need(_PLACES)
        shapes.check(_PLACES, count, f"the number of its {_VALUES}")
    else:
        refuse_surplus(shapes, _PLACES, "save_precomputed_indices is false")
    if settings.rank is None:
        for parameter in (_A, _B):
            refuse_surplus(shapes, parameter, "r is null")
        return ModuleOutline(Sparse.kind, 0)
    shapes.need(_A, _B)
    shapes.check_factors(_A, _B, settings.rank, f"r in {CONFIG_FILE}")
    return ModuleOutline(LowRank.kind, settings.rank, (Sparse.kind,))


def _read(settings: _Settings, module: ModuleTensors) -> tuple[Delta, ...]:
    shape = (module.out_features, module.in_features)
    if settings.largest is None:
        name, places = f"{module.module}.{_PLACES}", module.indices(_PLACES, math.prod(shape))
    else:
        name, places = f"{module.module}.{_VALUES}", settings.largest(module)
    entries = torch.stack((places // shape[1], places % shape[1]))
    sparse = sparse_from_entries(name, entries, module[_VALUES], shape)
    if settings.rank is None:
        return (sparse,)
    module.check_factors(_A, _B, settings.rank)
    return sparse, LowRank(module[_A], module[_B] * settings.scale)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"lora_alpha", "r", "save_precomputed_indices", "select_top", "sparsity"},
        harmless={"init_weights", "lora_dropout"},
    ),
    parameters=Parameters((_VALUES,), (_PLACES, _A, _B)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
