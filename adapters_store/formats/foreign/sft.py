"""Composable sparse fine-tuning (arXiv:2110.07560): `dW` is zero but at given entries, of biases
too.

The authors' code saves a pickle; `polydelta adapters import sft` makes a folder of it.
"""

from __future__ import annotations

from polydelta.adapters_store.delta import Bias, Delta, Sparse
from polydelta.adapters_store.formats.coordinates import whole_numbers
from polydelta.adapters_store.formats.csr import sparse_from_entries
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_tensors import Parameters

# `[2, nnz]` rows and columns, `[nnz]`, and `[out]`: a module has the first two, the third, or all.
INDICES, VALUES, BIAS = "sft_indices", "sft_values", "sft_bias"


def _outline_module(_: Config, shapes: ModuleShapes) -> ModuleOutline:
    if INDICES not in shapes and VALUES not in shapes:
        return ModuleOutline(Bias.kind, 0)
    shapes.need(INDICES, VALUES)
    shapes.check(VALUES, shapes[INDICES][-1:], f"the number of its {INDICES}")
    shapes.check(INDICES, (2, *shapes[VALUES]), "a row and a column for each value")
    return ModuleOutline(Sparse.kind, 0)


def _read_module(_: Config, tensors: ModuleTensors) -> tuple[Delta, ...]:
    deltas: list[Delta] = []
    if INDICES in tensors:
        name, shape = f"{tensors.module}.{INDICES}", (tensors.out_features, tensors.in_features)
        indices = whole_numbers(name, tensors.raw(INDICES))
        deltas.append(sparse_from_entries(name, indices, tensors[VALUES], shape))
    if BIAS in tensors:
        tensors.check(BIAS, (tensors.out_features,))
        deltas.append(Bias(tensors[BIAS]))
    return tuple(deltas)


FORMAT = PeftFormat(
    rules=key_rules(),
    parameters=Parameters(required=(), optional=(INDICES, VALUES, BIAS)),
    outline_module=_outline_module,
    read_module=_read_module,
    targets=lambda layout: layout.module_shapes,
)
