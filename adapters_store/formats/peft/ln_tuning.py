"""PEFT's LayerNorm tuning (arXiv:2312.11420): whole norms are trained, and replace the base's."""

from __future__ import annotations

from polydelta.adapters_store.delta import NormWeight
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_tensors import Parameters

_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


def _outline(_: Config, shapes: ModuleShapes) -> ModuleOutline:
    if _BIAS in shapes:
        raise InvalidAdapterError(
            f"Module {shapes.module!r} has {_BIAS}, but norms with a bias are not served: train "
            "the adapter on the base that is served."
        )
    return ModuleOutline(NormWeight.kind, 0)


def _read(_: Config, module: ModuleTensors) -> tuple[NormWeight]:
    size = module.layout.norm_sizes[module.module]
    module.shapes.check(_WEIGHT, (size,), "the base model's norm")
    return (NormWeight(module[_WEIGHT]),)


FORMAT = PeftFormat(
    rules=key_rules(),
    parameters=Parameters((_WEIGHT,), (_BIAS,)),
    outline_module=_outline,
    read_module=_read,
    targets=lambda layout: layout.norm_sizes,
)
