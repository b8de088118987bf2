"""PEFT's BEFT (arXiv:2509.15974): a trained bias beside the one that the layer may have."""

from __future__ import annotations

from polydelta.adapters_store.delta import Bias
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters

_BIAS = "beft_bias"


def _outline(_: Config, shapes: ModuleShapes) -> ModuleOutline:
    shapes.check(_BIAS, (1, *shapes[_BIAS][-1:]), "one vector a module")
    return ModuleOutline(Bias.kind, 0)


def _read(_: Config, module: ModuleTensors) -> tuple[Bias]:
    module.check(_BIAS, (1, module.out_features))
    return (Bias(module[_BIAS].flatten()),)


FORMAT = PeftFormat(
    rules=key_rules(harmless={"init_weights"}),
    parameters=Parameters((_BIAS,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
)
