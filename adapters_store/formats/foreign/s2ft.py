"""S2FT (arXiv:2412.06289): `dW` is zero but for some rows of v_proj and up_proj, and some columns
of o_proj and down_proj.

The authors' code saves a whole model with heads and channels in another order; `polydelta adapters
import s2ft` makes a folder with the changed rows and columns of it.
"""

from __future__ import annotations

from polydelta.adapters_store.delta import Bias, Columns, Delta, Rows
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.coordinates import positions
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_tensors import Parameters

INDICES = "s2ft_indices"
# `[k, in]` or `[out, k]`: what is added to the rows or columns of these indices, `[k]`.
ROWS, COLUMNS = "s2ft_rows", "s2ft_columns"
# [out]: what is added to the bias.
BIAS = "s2ft_bias"


def _outline_module(_: Config, shapes: ModuleShapes) -> ModuleOutline:
    if all(parameter not in shapes for parameter in (INDICES, ROWS, COLUMNS)):
        return ModuleOutline(Bias.kind, 0)
    shapes.need(INDICES)
    if (ROWS in shapes) == (COLUMNS in shapes):
        raise InvalidAdapterError(
            f"Module {shapes.module!r} must have {ROWS} or {COLUMNS}, and not both: import the "
            "fine-tuned model again."
        )
    count = shapes[INDICES][-1:] or (1,)
    shapes.check(INDICES, count, "a list of rows or columns")
    why = f"the number of its {INDICES}"
    if ROWS in shapes:
        shapes.check(ROWS, (*count, *shapes[ROWS][1:]), why)
        return ModuleOutline(Rows.kind, 0)
    shapes.check(COLUMNS, (*shapes[COLUMNS][:-1], *count), why)
    return ModuleOutline(Columns.kind, 0)


def _read_module(_: Config, tensors: ModuleTensors) -> tuple[Delta, ...]:
    deltas: list[Delta] = []
    if INDICES in tensors:
        deltas.append(_rows(tensors) if ROWS in tensors else _columns(tensors))
    if BIAS in tensors:
        tensors.check(BIAS, (tensors.out_features,))
        deltas.append(Bias(tensors[BIAS]))
    return tuple(deltas)


def _rows(tensors: ModuleTensors) -> Rows:
    name, indices = f"{tensors.module}.{INDICES}", tensors.raw(INDICES)
    tensors.check(ROWS, (len(indices), tensors.in_features))
    ascending, order = positions(name, indices, tensors.out_features)
    return Rows(tensors.out_features, ascending, tensors[ROWS][order])


def _columns(tensors: ModuleTensors) -> Columns:
    name, indices = f"{tensors.module}.{INDICES}", tensors.raw(INDICES)
    tensors.check(COLUMNS, (tensors.out_features, len(indices)))
    ascending, order = positions(name, indices, tensors.in_features)
    return Columns(tensors.in_features, ascending, tensors[COLUMNS][:, order])


FORMAT = PeftFormat(
    rules=key_rules(),
    parameters=Parameters(required=(), optional=(INDICES, ROWS, COLUMNS, BIAS)),
    outline_module=_outline_module,
    read_module=_read_module,
    targets=lambda layout: layout.module_shapes,
)
