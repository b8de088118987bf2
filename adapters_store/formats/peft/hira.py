"""PEFT's HiRA (the ICLR 2025 paper of that name): `dW = W * (B @ A)`, entry by entry."""

from __future__ import annotations

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import (
    MODULE_CHOICE,
    linear_layers,
)
from polydelta.adapters_store.formats.peft_shapes import dimensions
from polydelta.adapters_store.formats.peft_tensors import Parameters

_A, _B = "hira_A", "hira_B"


def _outline(_config: Config, shapes: ModuleShapes) -> ModuleOutline:
    rank, _ = dimensions(shapes, _A, 2)
    shapes.check(_B, (*shapes[_B][:1], rank), f"the rank of its {_A}")
    return ModuleOutline(Dense.kind, 0)


def _read(_config: Config, module: ModuleTensors) -> tuple[Dense]:
    module.check(_A, (module.shapes[_A][0], module.in_features))
    module.check(_B, (module.out_features, module.shapes[_B][1]))
    return (Dense(module.weight() * (module[_B] @ module[_A])),)


FORMAT = PeftFormat(
    rules=KeyRules(
        honoured=frozenset(),
        # The rank has no part in the scale, and the tensors have it.
        harmless=COMMON_HARMLESS
        | MODULE_CHOICE
        | {"hira_dropout", "init_weights", "r", "rank_pattern"},
        refused=COMMON_REFUSED,
    ),
    parameters=Parameters(required=(_A, _B)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
)
