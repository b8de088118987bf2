"""PEFT's C3A (arXiv:2407.19342): `dW` consists of circulant blocks, each given by one row of it.

What PEFT stores is `in_features` times the change.
"""

from __future__ import annotations

from polydelta.adapters_store.delta import Circulant
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import MODULE_CHOICE, linear_layers
from polydelta.adapters_store.formats.peft_shapes import dimensions
from polydelta.adapters_store.formats.peft_tensors import Parameters

_KERNEL = "c3a_kernel"


def _outline(_: Config, shapes: ModuleShapes) -> ModuleOutline:
    dimensions(shapes, _KERNEL, 3)
    return ModuleOutline(Circulant.kind, 0)


def _read(_: Config, module: ModuleTensors) -> tuple[Circulant]:
    delta = Circulant(module[_KERNEL] / module.in_features)
    if delta.shape != (module.out_features, module.in_features):
        raise InvalidAdapterError(
            f"The {_KERNEL} of {module.module!r} makes a change of shape {list(delta.shape)}, but "
            f"the base model's layer has {[module.out_features, module.in_features]}: the adapter "
            "was trained on another base."
        )
    return (delta,)


FORMAT = PeftFormat(
    rules=KeyRules(
        honoured=frozenset(),
        # The kernel's shape says how large its blocks are; biases that were trained are saved
        # modules.
        harmless=COMMON_HARMLESS
        | MODULE_CHOICE
        | {"bias", "block_size", "block_size_pattern", "init_weights"},
        refused=COMMON_REFUSED,
    ),
    parameters=Parameters((_KERNEL,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
)
