"""PEFT's C3A (arXiv:2407.19342): `dW` consists of circulant blocks, each given by one row of it.

What PEFT stores is `in_features` times the change.
"""

from __future__ import annotations

from polydelta.adapters_store.delta import Circulant
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters

_KERNEL = "c3a_kernel"


def _outline(_: Config, shapes: ModuleShapes) -> ModuleOutline:
    shapes.dimensions(_KERNEL, 3)
    return ModuleOutline(Circulant.kind, 0)


def _read(_: Config, module: ModuleTensors) -> tuple[Circulant]:
    delta = Circulant(module[_KERNEL] / module.in_features)
    module.check_change(delta.shape)
    return (delta,)


FORMAT = PeftFormat(
    rules=key_rules(
        # The kernel's shape says how large its blocks are.
        harmless={"block_size", "block_size_pattern", "init_weights"},
    ),
    parameters=Parameters((_KERNEL,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
)
