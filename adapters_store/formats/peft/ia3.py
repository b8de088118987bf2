"""PEFT's (IA)^3 (arXiv:2205.05638): a vector scales what a layer gives, its bias included; or, of
modules that the config calls feedforward ones, what it takes."""

from __future__ import annotations

import reprlib
from collections.abc import Callable

from polydelta.adapters_store.delta import Scale, Side
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, flag, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_patterns import PatternTable, ends_in
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_VECTOR = "ia3_l"


# Whether a module of this name scales what it takes; None when the config does not say.
_IsFeedforward = Callable[[str], bool] | None


def _is_feedforward(config: Config) -> _IsFeedforward:
    """By PEFT's rule: a list has endings of names, a string is an expression for whole names."""
    modules = config.get("feedforward_modules")
    if modules is None:
        return None
    if isinstance(modules, str):
        whole = {rf"\A(?:{modules})": True}
        return PatternTable("feedforward_modules", whole, False, flag).__getitem__
    if isinstance(modules, list) and all(isinstance(ending, str) for ending in modules):
        endings = frozenset(modules)
        return lambda module: ends_in(module, endings)
    raise InvalidAdapterError(
        f"{CONFIG_FILE}: feedforward_modules is {reprlib.repr(modules)}, but must be a list of "
        "names or a regular expression."
    )


def _outline(is_feedforward: _IsFeedforward, shapes: ModuleShapes) -> ModuleOutline:
    _side(is_feedforward, shapes)
    return ModuleOutline(Scale.kind, 0)


def _read(is_feedforward: _IsFeedforward, module: ModuleTensors) -> tuple[Scale]:
    side = _side(is_feedforward, module.shapes)
    if side is Side.INPUT:
        module.check(_VECTOR, (1, module.in_features))
    else:
        module.check(_VECTOR, (module.out_features, 1))
    return (Scale(module[_VECTOR].flatten(), side),)


def _side(is_feedforward: _IsFeedforward, shapes: ModuleShapes) -> Side:
    """Raises InvalidAdapterError when the config and the vector's shape do not say the same."""
    shape = shapes[_VECTOR]
    of_input = shape[:1] == (1,) if is_feedforward is None else is_feedforward(shapes.module)
    why = (
        f"feedforward_modules in {CONFIG_FILE}, by which this one {'is' if of_input else 'is not'} "
        "among them,"
    )
    if of_input:
        shapes.check(_VECTOR, (1, *shape[-1:]), why)
        return Side.INPUT
    shapes.check(_VECTOR, (*shape[:1], 1), why)
    return Side.OUTPUT


FORMAT = PeftFormat(
    rules=key_rules(honoured={"feedforward_modules"}, harmless={"init_ia3_weights"}),
    parameters=Parameters((_VECTOR,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_is_feedforward,
)
