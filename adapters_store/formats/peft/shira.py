"""PEFT's SHiRA (arXiv:2406.13175): `dW` is non-zero at a fixed set of entries.

The file holds values and their places; PEFT's scaling of 1 is not stored anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta, Sparse
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.csr import sparse_from_entries
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
)
from polydelta.adapters_store.formats.peft_tensors import (
    check_modules,
    check_shape,
    group_by_module,
)

KEY_RULES = KeyRules(
    honoured=frozenset(),
    # All of these only say how the entries were chosen or started; the file has the entries. `r`
    # is no rank: it sets their number to that of a LoRA of this rank.
    harmless=COMMON_HARMLESS | {"init_weights", "mask_type", "r", "random_seed"},
    refused=COMMON_REFUSED,
)

_VALUES, _INDICES = "shira_weight", "shira_indices"


def outline(config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """What each module gets, from the config and the tensors' shapes alone.

    Raises InvalidAdapterError for all that is wrong whatever the base.
    """
    KEY_RULES.check(config)
    modules: dict[str, ModuleOutline] = {}
    for module, names in group_by_module(shapes, (_VALUES, _INDICES)).items():
        values, indices = shapes[names[_VALUES]], shapes[names[_INDICES]]
        check_shape(names[_VALUES], values, indices[-1:], f"the number of its {_INDICES}")
        check_shape(names[_INDICES], indices, (2, *values), "a row and a column for each value")
        modules[module] = ModuleOutline(Sparse.kind, 0)
    return modules


def read(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    """Module path -> its delta, values in float32. Raises InvalidAdapterError."""
    modules = outline(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    check_modules(modules, layout)
    return {
        module: (
            sparse_from_entries(
                names[_INDICES],
                _whole_numbers(names[_INDICES], tensors[names[_INDICES]]),
                to_float32(names[_VALUES], tensors[names[_VALUES]]),
                layout.module_shapes[module],
            ),
        )
        for module, names in group_by_module(tensors, (_VALUES, _INDICES)).items()
    }


def _whole_numbers(name: str, indices: Tensor) -> Tensor:
    """As int64. PEFT on Windows saves the indices as float32, which holds whole numbers up to
    2**24 exactly: more than any row or column."""
    if indices.dtype.is_floating_point:
        return to_float32(name, indices).round().to(torch.int64)
    if indices.dtype.is_complex or indices.dtype == torch.bool:
        raise InvalidAdapterError(f"Tensor {name!r} is {indices.dtype}: indices must be integers.")
    return indices.to(torch.int64)
