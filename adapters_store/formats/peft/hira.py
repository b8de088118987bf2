"""PEFT's HiRA (the ICLR 2025 paper of that name): `dW = W * (B @ A)`, entry by entry."""

from __future__ import annotations

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters

_A, _B = "hira_A", "hira_B"


def _outline(_config: Config, shapes: ModuleShapes) -> ModuleOutline:
    rank, _ = shapes.dimensions(_A, 2)
    shapes.check_factors(_A, _B, rank, f"the rank of its {_A}")
    return ModuleOutline(Dense.kind, 0)


def _read(_config: Config, module: ModuleTensors) -> tuple[Dense]:
    module.check_factors(_A, _B, module.shapes[_A][0])
    return (Dense(module.weight() * (module[_B] @ module[_A])),)


FORMAT = PeftFormat(
    rules=key_rules(
        # The rank has no part in the scale, and the tensors have it.
        harmless={"hira_dropout", "init_weights", "r", "rank_pattern"},
    ),
    parameters=Parameters(required=(_A, _B)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
)
