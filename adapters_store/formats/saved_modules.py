"""Whole modules in an adapter's file, which replace the base's: those of `modules_to_save`, biases
that were trained with the option `bias`, and the embedding and head, which PEFT saves too when they
were targeted or given more rows.

Their tensors are called as the base's are, whatever the format of the rest.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.delta import Bias, Delta, NormWeight, Rows, TokenRows
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, strings
from polydelta.adapters_store.formats.peft_patterns import ends_in
from polydelta.adapters_store.formats.peft_tensors import check_shape
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

T = TypeVar("T")

_WEIGHT, _BIAS = "weight", "bias"
_TOKENS = (EMBEDDING, HEAD)
_PREFIX = "base_model."
# What PEFT puts between a module's name and that of its weight, where it wraps the module.
_WRAPPERS = (".token_adapter.base_layer", ".base_layer")
# What a saved module and the base's own beneath it are called within PEFT.
_SAVED, _BENEATH = ".modules_to_save.", ".original_module."


@dataclass(frozen=True)
class _Place:
    """Which tensor of the base is replaced."""

    module: str
    # "weight" or "bias"
    parameter: str


def take_out(entries: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Of a file's tensors, or their shapes, by name: those of saved modules, and the others."""
    saved = {name: entry for name, entry in entries.items() if _place(name) is not None}
    rest = {
        name: entry
        for name, entry in entries.items()
        if name not in saved and not _is_copy(name, saved)
    }
    return saved, rest


def outline(shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """What modules get unless what was saved is the base's own, which the numbers alone tell.

    Raises InvalidAdapterError for what no base has.
    """
    kinds: dict[str, list[str]] = {}
    for place in _by_place(shapes):
        kinds.setdefault(place.module, []).append(_kind(place))
    return {
        module: ModuleOutline(first, 0, tuple(also)) for module, (first, *also) in kinds.items()
    }


def read(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    """Module path -> what makes the base's module the saved one; nothing where it is the same.

    Raises InvalidAdapterError for a module that the base does not have or that has another size,
    and when a module of `modules_to_save` is missing.
    """
    names = _by_place(tensors)
    _check_known({place.module for place in names}, layout)
    saves = _Saves(strings("modules_to_save", config.get("modules_to_save")))
    saves.check_complete({place.module for place in names if place.parameter == _WEIGHT}, layout)
    values = {
        place: _read_tensor(name, tensors[name], place, layout) for place, name in names.items()
    }
    if layout.tied:
        values = _tie(values, saves)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for place, value in values.items():
        deltas[place.module] = (*deltas.get(place.module, ()), *_deltas(place, value, layout))
    return {module: of_module for module, of_module in deltas.items() if of_module}


def layout_beneath(layout: BaseLayout, replaced: Collection[str]) -> BaseLayout:
    """The base for what comes with saved modules: it has no weights of the modules of which they
    replace them, for a change that was computed from the base's would be a wrong one.

    Its `weight` raises InvalidAdapterError for these.
    """
    if not replaced:
        return layout
    return _LayoutBeneath(
        **{field.name: getattr(layout, field.name) for field in fields(layout)}, replaced=replaced
    )


@dataclass(frozen=True)
class _LayoutBeneath(BaseLayout):
    replaced: Container[str] = ()

    def weight(self, module: str) -> Tensor:
        if module in self.replaced:
            raise InvalidAdapterError(
                f"The adapter replaces the weight of {module!r}, and its change of the same module "
                "has to be computed from it, which is not served: train over the base as it is "
                "served, or merge the adapter into a base model of its own."
            )
        return super().weight(module)


@dataclass(frozen=True)
class _Saves:
    """`modules_to_save`: ends of the names of modules, or of what they are part of."""

    listed: list[str]

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(self.listed)

    def __contains__(self, module: str) -> bool:
        return any(ends_in(path, self._ends) for path in _with_parents(module))

    def check_complete(self, saved: Container[str], layout: BaseLayout) -> None:
        """saved: modules whose weight the file has. Raises InvalidAdapterError when one is missing
        that PEFT would have saved."""
        for module in _known(layout):
            if module in self and module not in saved:
                raise InvalidAdapterError(
                    f"{CONFIG_FILE}: modules_to_save is {reprlib.repr(self.listed)}, but "
                    f"{WEIGHTS_FILE} has no weight of {module!r}: save the adapter again from the "
                    "trained model."
                )


def _with_parents(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


def _known(layout: BaseLayout) -> dict[str, object]:
    return {**layout.target_shapes, **layout.norm_sizes}


def _check_known(modules: set[str], layout: BaseLayout) -> None:
    for module in sorted(modules - _known(layout).keys()):
        raise InvalidAdapterError(
            f"The adapter replaces {module[:200]!r}, but the base model has no such module in its "
            f"{layout.num_layers} decoder layers: load it over the base that it was trained on."
        )


def _place(name: str) -> _Place | None:
    """None for a tensor that is not named as one of the base's."""
    if _SAVED in name or _BENEATH in name:
        return None
    path, _, parameter = name.rpartition(".")
    for wrapper in _WRAPPERS:
        if path.endswith(wrapper):
            path = path.removesuffix(wrapper)
            break
    module = path.removeprefix(_PREFIX)
    # Prompts come without the second prefix, which stands for a model with adapters in it.
    if module.startswith(("model.model.", f"model.{HEAD}")):
        module = module.removeprefix("model.")
    is_inside = module != path and (module == HEAD or module.startswith("model."))
    is_base = module.endswith((*_TOKENS, "norm", "_proj"))
    return (
        _Place(module, parameter)
        if parameter in (_WEIGHT, _BIAS) and is_inside and is_base
        else None
    )


def _is_copy(name: str, saved: Container[str]) -> bool:
    """Whether PEFT does not look at a tensor: the base's own beneath a saved module, or the saved
    module a second time. `bias="all"` and `save_embedding_layers` bring them in."""
    before, _, after = name.partition(_SAVED)
    # The adapter's name may stand before the rest.
    twice = (f"{before}.{after}", f"{before}.{after.partition('.')[2]}")
    is_twice = _SAVED in name and any(other in saved for other in twice)
    return name.startswith(_PREFIX) and (_BENEATH in name or is_twice)


def _by_place(names: Mapping[str, object]) -> dict[_Place, str]:
    places: dict[_Place, str] = {}
    for name in names:
        place = _place(name)
        if place is None:
            continue
        if place in places:
            raise InvalidAdapterError(
                f"{WEIGHTS_FILE} has the {place.parameter} of {place.module[:200]!r} twice, as "
                f"{places[place][:200]!r} and {name[:200]!r}: save the adapter again from the "
                "trained model."
            )
        places[place] = name
    return places


def _kind(place: _Place) -> str:
    is_norm = place.module.endswith("norm")
    if place.parameter == _WEIGHT:
        if place.module in _TOKENS:
            return TokenRows.kind
        return NormWeight.kind if is_norm else Rows.kind
    if is_norm or place.module in _TOKENS:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} has a bias of {place.module[:200]!r}, but norms, embeddings and heads "
            "with a bias are not served: load the adapter over the base that it was trained on."
        )
    return Bias.kind


def _read_tensor(name: str, tensor: Tensor, place: _Place, layout: BaseLayout) -> Tensor:
    """Of the shape of the base's, float32."""
    shape, module = tuple(tensor.shape), place.module
    if place.parameter == _BIAS:
        if module not in layout.biased_modules:
            raise InvalidAdapterError(
                f"{WEIGHTS_FILE} has a bias of {module!r}, but the base model has none there: load "
                "the adapter over the base that it was trained on."
            )
        check_shape(name, shape, layout.module_shapes[module][:1], "the base model's bias")
    elif module in _TOKENS:
        _check_rows(name, shape, layout)
    elif module in layout.norm_sizes:
        check_shape(name, shape, (layout.norm_sizes[module],), "the base model's norm")
    else:
        check_shape(name, shape, layout.module_shapes[module], "the base model's layer")
    return to_float32(name, tensor)


def _check_rows(name: str, shape: Shape, layout: BaseLayout) -> None:
    if shape[1:] == (layout.hidden_size,) and shape[0] != layout.vocab_size:
        raise InvalidAdapterError(
            f"Tensor {name!r} has rows for {shape[0]} tokens, but the base model has "
            f"{layout.vocab_size}: resize the base's embeddings as the training did, and serve "
            "that base; or save with save_embedding_layers=False if the new tokens were not "
            "trained."
        )
    expected = (layout.vocab_size, layout.hidden_size)
    check_shape(name, shape, expected, "the base model's embedding")


def _tie(values: dict[_Place, Tensor], saves: _Saves) -> dict[_Place, Tensor]:
    """One weight is both embedding and head, and PEFT loads into it what is saved of either, but
    for a module of `modules_to_save`, which is a copy by then."""
    places = [_Place(module, _WEIGHT) for module in _TOKENS]
    shared = [values[place] for place in places if place in values and place.module not in saves]
    if not shared:
        return values
    own = {place: values[place] for place in places if place in values and place.module in saves}
    return {**values, **dict.fromkeys(places, shared[-1]), **own}


def _deltas(place: _Place, value: Tensor, layout: BaseLayout) -> tuple[Delta, ...]:
    if place.parameter == _BIAS:
        bias = layout.bias(place.module)
        change = value if bias is None else value - bias
        return (Bias(change),) if change.any() else ()
    if place.module in layout.norm_sizes:
        return (NormWeight(value),)
    weight = layout.weight(place.module)
    changed = _changed_rows(value, weight)
    if not len(changed):
        return ()
    if place.module in _TOKENS:
        return (TokenRows(changed, value[changed]),)
    block = value[changed] - weight[changed]
    return (Rows(weight.shape[0], changed.to(torch.int32), block),)


def _changed_rows(value: Tensor, weight: Tensor) -> Tensor:
    """Both [rows, columns] float32 -> int64, ascending.

    The base's weight is rounded to the dtype in which it is served, and the file's may not be: rows
    are compared in the widest dtype in which any are equal. Rows of zeros, as unused tokens have
    them, are equal in all.
    """
    equal = torch.zeros(len(value), dtype=torch.bool)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        equal = (value.to(dtype).to(torch.float32) == weight).all(1)
        if (equal & weight.any(1)).any():
            break
    return (~equal).nonzero().squeeze(1)
