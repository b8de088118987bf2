"""PEFT's SHiRA (arXiv:2406.13175): `dW` is non-zero at a fixed set of entries.

The file holds values and their places; PEFT's scaling of 1 is not stored anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Sparse
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.coordinates import whole_numbers
from polydelta.adapters_store.formats.csr import sparse_from_entries
from polydelta.adapters_store.formats.files import to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_tensors import Parameters

_VALUES, _INDICES = "shira_weight", "shira_indices"


def _outline(_: Config, shapes: ModuleShapes) -> ModuleOutline:
    shapes.check(_VALUES, shapes[_INDICES][-1:], f"the number of its {_INDICES}")
    shapes.check(_INDICES, (2, *shapes[_VALUES]), "a row and a column for each value")
    return ModuleOutline(Sparse.kind, 0)


def _read(_: Config, module: ModuleTensors) -> tuple[Sparse]:
    name, shape = f"{module.module}.{_INDICES}", (module.out_features, module.in_features)
    entries = _whole_numbers(name, module.raw(_INDICES))
    return (sparse_from_entries(name, entries, module[_VALUES], shape),)


def _whole_numbers(name: str, indices: Tensor) -> Tensor:
    """As int64. PEFT on Windows saves the indices as float32, which holds whole numbers up to
    2**24 exactly: more than any row or column. Others were rounded."""
    if indices.dtype != torch.float32:
        return whole_numbers(name, indices)
    places = to_float32(name, indices)
    if (places != places.trunc()).any():
        raise InvalidAdapterError(
            f"Tensor {name!r} has indices that are no whole numbers: save the adapter again from "
            "the trained model."
        )
    return places.to(torch.int64)


FORMAT = PeftFormat(
    rules=key_rules(
        # All of these only say how the entries were chosen or started; the file has the entries.
        # `r` is no rank: it sets their number to that of a LoRA of this rank.
        harmless={"init_weights", "mask_type", "r", "random_seed"},
    ),
    parameters=Parameters((_VALUES, _INDICES)),
    outline_module=_outline,
    read_module=_read,
    targets=lambda layout: layout.module_shapes,
)
