"""SoRA (arXiv:2311.11696): a LoRA with a gate on each rank, `y += scale * B (gate * (A x))`.

Training drives gates to exactly 0, and what they close is left out here, so modules come with
ranks of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.foreign.lora_options import (
    LoraOptions,
    lora_options,
    lora_rules,
)
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters

_A, _B, _GATE = "lora_A", "lora_B", "gate"


def outline(config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """With the rank before gates close, which the numbers alone tell.

    Raises InvalidAdapterError for all that is wrong whatever the base.
    """
    return _FORMAT.outline(config, shapes)


def read(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    """Module path -> its delta, in float32; modules whose gates are all closed are not there.

    Raises InvalidAdapterError, also when no module is left.
    """
    modules = _FORMAT.read(config, tensors, layout)
    changed = {module: deltas for module, deltas in modules.items() if deltas}
    if not changed:
        raise InvalidAdapterError(
            f"All gates of the adapter's {len(modules)} modules are 0, so it would give the base "
            "model's answers: take an earlier checkpoint, or train with a smaller penalty."
        )
    return changed


def _outline_module(options: LoraOptions, shapes: ModuleShapes) -> ModuleOutline:
    shapes.check_factors(_A, _B, options.rank, options.why)
    shapes.check(_GATE, (1, options.rank), options.why)
    return ModuleOutline(LowRank.kind, options.rank)


def _read_module(options: LoraOptions, tensors: ModuleTensors) -> tuple[LowRank, ...]:
    tensors.check_factors(_A, _B, options.rank)
    gate = tensors[_GATE].squeeze(0)
    opened = gate.nonzero().squeeze(1)
    if not len(opened):
        return ()
    b = tensors[_B][:, opened] * (gate[opened] * options.scale)
    return (LowRank(tensors[_A][opened], b),)


_FORMAT = PeftFormat(
    rules=lora_rules(),
    parameters=Parameters((_A, _B, _GATE)),
    outline_module=_outline_module,
    read_module=_read_module,
    targets=linear_layers,
    settings=lora_options,
)
