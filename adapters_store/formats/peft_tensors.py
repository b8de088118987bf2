"""Which tensor of a PEFT file belongs to which module: `base_model.model.` + module path + `.` +
parameter name. A tensor that nobody claims is an error: left out, it would change the answer.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import all_finite
from polydelta.adapters_store.reference import WEIGHTS_FILE

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Parameters:
    """What the tensors of a format are called, after the module's path."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    # Full names of tensors that all modules share, e.g. `base_model.vera_A`; optional. A name that
    # ends in a dot stands for all that go on with a number: `base_model.tinylora_v.`.
    shared: tuple[str, ...] = ()
    # About training; may be there and mean nothing to a server.
    ignored: tuple[str, ...] = ()


def group(names: Iterable[str], parameters: Parameters) -> dict[str, ChainMap[str, str]]:
    """Module path -> parameter -> tensor name; behind a module's own tensors, as the second of the
    chained maps, are the shared ones under their full names. Raises InvalidAdapterError as
    `group_by_module` does."""
    everything = list(names)
    shared = {name: name for name in everything if _is_shared(name, parameters)}
    modules = group_by_module(
        [name for name in everything if name not in shared],
        parameters.required,
        parameters.ignored,
        parameters.optional,
    )
    return {module: ChainMap(of_module, shared) for module, of_module in modules.items()}


def group_by_module(
    names: Iterable[str],
    required: Collection[str],
    ignored: Collection[str] = (),
    optional: Collection[str] = (),
) -> dict[str, dict[str, str]]:
    """Module path -> parameter -> tensor name, for the parameters that each module must or may
    have.

    `ignored` parameters may be there and mean nothing to a server. Raises InvalidAdapterError for
    a tensor that is none of these, and for a module without all of `required`.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        module, parameter = _split(name, (*required, *optional, *ignored))
        if parameter not in ignored:
            modules.setdefault(module, {})[parameter] = name
    for module, tensors in modules.items():
        missing = [parameter for parameter in required if parameter not in tensors]
        if missing:
            raise InvalidAdapterError(
                f"Module {module!r} has {', '.join(tensors)} but no {' or '.join(missing)} in "
                f"{WEIGHTS_FILE}: save the adapter again from the trained model."
            )
    return modules


def check_modules(
    modules: Collection[str], layout: BaseLayout, targets: Mapping[str, object] | None = None
) -> None:
    """Raises InvalidAdapterError for a module that the base model does not have.

    targets: those that can be changed, by full path; without it, `layout.module_shapes`.
    """
    shapes = layout.module_shapes if targets is None else targets
    foreign = [module for module in modules if module not in shapes]
    if not foreign:
        return
    if len(foreign) == len(modules):
        raise InvalidAdapterError(
            f"None of the adapter's {len(modules)} modules is in the base model, so it would give "
            f"the base model's answers: it has {foreign[0][:200]!r}, the base has "
            f"{next(iter(shapes))!r}. Load it over the base that it was trained on."
        )
    raise InvalidAdapterError(
        f"The adapter changes {foreign[0][:200]!r}, but the base model has no such module in "
        f"its {layout.num_layers} decoder layers: load it over the base that it was trained on."
    )


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], why: str) -> None:
    """why: where the expected shape comes from. Raises InvalidAdapterError when they differ."""
    if shape != expected:
        raise InvalidAdapterError(
            f"Tensor {name!r} has shape {list(shape)}, but {why} asks for {list(expected)}: the "
            "weights belong to another config or another base, or were not saved whole."
        )


def check_finite(module: str, deltas: Iterable[Delta]) -> None:
    """Raises InvalidAdapterError when scales and products went beyond float32."""
    values = (getattr(delta, field.name) for delta in deltas for field in fields(delta))
    floats = (v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    if not all(map(all_finite, floats)):
        raise InvalidAdapterError(
            f"The change of {module!r} has numbers beyond what float32 holds once its scale is "
            "folded in: check the scales in the config, or take an earlier checkpoint."
        )


def _is_shared(name: str, parameters: Parameters) -> bool:
    stem, dot, number = name.rpartition(".")
    numbered = number.isdecimal() and f"{stem}{dot}" in parameters.shared
    return numbered or name in parameters.shared


def _split(name: str, parameters: Iterable[str]) -> tuple[str, str]:
    for parameter in parameters:
        if name.startswith(_PREFIX) and name.endswith(f".{parameter}"):
            return name[len(_PREFIX) : -len(parameter) - 1], parameter
    known = ", ".join(parameters)
    raise InvalidAdapterError(
        f"Tensor {name[:200]!r} cannot be served; only tensors named {_PREFIX}<module>.<parameter> "
        f"are understood, with the parameter {known}: save the adapter again with these alone."
    )
