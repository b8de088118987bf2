"""A format whose file has, for each module that it changes, tensors of the same names.

Most of PEFT's tuners are like that: a parser says what a module's tensors are called, and makes
deltas of one module's; the rest is here.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, BaseLayout
from polydelta.adapters_store.delta import Delta
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, KeyRules
from polydelta.adapters_store.formats.peft_tensors import (
    Parameters,
    check_finite,
    check_modules,
    check_shape,
    group,
)
from polydelta.adapters_store.formats.ranks import check_rank
from polydelta.adapters_store.reference import CONFIG_FILE


class ModuleShapes:
    """The tensors of one module, by what the format calls them, as far as the file's header says.

    Shared tensors, which the file has once for all modules, are among them.
    """

    def __init__(self, module: str, names: ChainMap[str, str], shapes: Mapping[str, Shape]) -> None:
        """names: as `group` gives them."""
        self.module = module
        self._names = names
        self._shapes = shapes

    @property
    def num_shared(self) -> int:
        """How many shared tensors the file has."""
        return len(self._names.maps[1])

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._names

    def __getitem__(self, parameter: str) -> Shape:
        return self._shapes[self._names[parameter]]

    def check(self, parameter: str, expected: Shape, why: str) -> None:
        """why: where the expected shape comes from. Raises InvalidAdapterError when it differs."""
        check_shape(self._names[parameter], self[parameter], expected, why)

    def dimensions(self, parameter: str, count: int) -> Shape:
        """The shape, which the file alone says. Raises InvalidAdapterError when it does not have
        `count` dimensions."""
        shape = self[parameter]
        if len(shape) != count:
            raise InvalidAdapterError(
                f"Module {self.module!r} has a {parameter} of shape {list(shape)}, but it must "
                f"have {count} dimensions: save the adapter again from the trained model."
            )
        return shape

    def check_factors(self, a: str, b: str, rank: int, why: str) -> None:
        """Of a low-rank change: a is `[rank, in]`, b `[out, rank]`. Raises InvalidAdapterError."""
        self.check(a, (rank, *self[a][-1:]), why)
        self.check(b, (*self[b][:1], rank), why)

    def need(self, *parameters: str) -> None:
        """Raises InvalidAdapterError for one that the file does not have for this module."""
        for parameter in parameters:
            if parameter not in self:
                raise InvalidAdapterError(
                    f"Module {self.module!r} has {', '.join(self._names.maps[0])} but no "
                    f"{parameter}: save the adapter again from the trained model."
                )


class ModuleTensors:
    """One module's part of a file, over the base that it is to run on."""

    def __init__(
        self,
        shapes: ModuleShapes,
        names: ChainMap[str, str],
        tensors: Mapping[str, Tensor],
        layout: BaseLayout,
        modules: Sequence[str],
        shared: dict[str, Tensor],
    ) -> None:
        """names: as `group` gives them; modules: see below; shared: filled here, with the file's
        shared tensors in float32: they may be large, and need not be converted for every module.
        """
        self.shapes = shapes
        self.module = shapes.module
        self.layout = layout
        # All that the file changes, in the order in which the base model has them.
        self.modules = modules
        self._names = names
        self._tensors = tensors
        self._shared = shared

    @property
    def out_features(self) -> int:
        return self.layout.target_shapes[self.module][0]

    @property
    def in_features(self) -> int:
        return self.layout.target_shapes[self.module][1]

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._names

    def __getitem__(self, parameter: str) -> Tensor:
        """In float32. Raises InvalidAdapterError for what is no float, or not finite."""
        name = self._names[parameter]
        if name in self._shared:
            return self._shared[name]
        values = to_float32(name, self._tensors[name])
        if parameter in self._names.maps[1]:
            self._shared[name] = values
        return values

    def raw(self, parameter: str) -> Tensor:
        """In the file's dtype: for indices."""
        return self._tensors[self._names[parameter]]

    def indices(self, parameter: str, size: int) -> Tensor:
        """As int64. Raises InvalidAdapterError for what is no integer, or not in 0 to size - 1."""
        name, indices = self._names[parameter], self.raw(parameter)
        dtype = indices.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise InvalidAdapterError(f"Tensor {name!r} is {dtype}: indices must be integers.")
        indices = indices.to(torch.int64)
        if ((indices < 0) | (indices >= size)).any():
            raise InvalidAdapterError(
                f"Tensor {name!r} has indices that are not in 0 to {size - 1}: save the adapter "
                "again from the trained model."
            )
        return indices

    def check(self, parameter: str, expected: Shape) -> None:
        """Raises InvalidAdapterError when it does not fit the base model's layer."""
        self.shapes.check(parameter, expected, "the base model's layer")

    def check_factors(self, a: str, b: str, rank: int) -> None:
        """As `ModuleShapes.check_factors`, for the base model's layer."""
        self.check(a, (rank, self.in_features))
        self.check(b, (self.out_features, rank))

    def check_change(self, shape: tuple[int, int]) -> None:
        """shape: of the change that the tensors make together. Raises InvalidAdapterError when it
        is not the base model's layer's."""
        expected = (self.out_features, self.in_features)
        if shape != expected:
            raise InvalidAdapterError(
                f"The change of {self.module!r} has shape {list(shape)}, but the base model's "
                f"layer has {list(expected)}: load it over the base that it was trained on."
            )

    def check_divides(self, field: str, parts: int) -> None:
        """field: the config's key with the number of parts. Raises InvalidAdapterError when the
        base model's layer cannot be cut into as many, by rows and by columns."""
        if self.out_features % parts or self.in_features % parts:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: {field} is {parts}, which does not divide the base model's layer "
                f"{self.module!r} of shape {[self.out_features, self.in_features]}: load the "
                "adapter over the base that it was trained on."
            )

    def weight(self) -> Tensor:
        """The base's weight of this module, `[out, in]` float32."""
        return self.layout.weight(self.module)

    def bias(self) -> Tensor | None:
        """The base's bias of this module, `[out]` float32."""
        return self.layout.bias(self.module)


S = TypeVar("S")

_as_it_is: Any = lambda config: config  # noqa: E731


@dataclass(frozen=True)
class PeftFormat(Generic[S]):
    """A parser, made of what is particular to its format."""

    rules: KeyRules
    parameters: Parameters
    # What a module gets, from the settings and the shapes alone. Raises InvalidAdapterError for all
    # that is wrong whatever the base.
    outline_module: Callable[[S, ModuleShapes], ModuleOutline]
    # Its deltas, in float32. Raises InvalidAdapterError. The settings and the shapes are known to
    # have passed `outline_module`.
    read_module: Callable[[S, ModuleTensors], tuple[Delta, ...]]
    # Which modules of the base it may change.
    targets: Callable[[BaseLayout], Mapping[str, object]] = lambda layout: layout.target_shapes
    # What the functions above get of the config, made once for a file; by default the config as it
    # is. Raises InvalidAdapterError.
    settings: Callable[[Config], S] = _as_it_is
    # Tensors that PEFT makes again from a seed instead of saving them, by name; for the settings
    # and the file's modules, in the base model's order.
    regenerate: Callable[[S, Sequence[str], BaseLayout], Mapping[str, Tensor]] = (
        lambda _settings, _modules, _layout: {}
    )

    def outline(self, config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        return self._outline(self._settings(config), shapes)

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
    ) -> dict[str, tuple[Delta, ...]]:
        settings, targets = self._settings(config), self.targets(layout)
        outline = self._outline(settings, _shapes(tensors))
        check_modules(outline, layout, targets)
        # The embedding is a model's first module, though not the first that a layout names.
        in_order = sorted(targets, key=lambda module: module != EMBEDDING)
        modules = [module for module in in_order if module in outline]
        own_names = group(tensors, self.parameters)
        for module in modules:
            rank, shape = outline[module].rank, layout.target_shapes.get(module)
            # Factors that are in the file are as large as they are.
            if shape is not None and self._held(own_names[module], tensors) < rank * min(shape):
                check_rank(module, rank, shape)
        tensors = {**tensors, **self.regenerate(settings, modules, layout)}
        shapes, names = _shapes(tensors), group(tensors, self.parameters)
        deltas: dict[str, tuple[Delta, ...]] = {}
        shared: dict[str, Tensor] = {}
        for module in modules:
            of_module = ModuleTensors(
                ModuleShapes(module, names[module], shapes),
                names[module],
                tensors,
                layout,
                modules,
                shared,
            )
            deltas[module] = self.read_module(settings, of_module)
            check_finite(module, deltas[module])
        return deltas

    def _held(self, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
        """Numbers in the file that are one module's own."""
        own = (*self.parameters.required, *self.parameters.optional)
        return sum(tensors[names[parameter]].numel() for parameter in own if parameter in names)

    def _settings(self, config: Config) -> S:
        self.rules.check(config)
        return self.settings(config)

    def _outline(self, settings: S, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        return {
            module: self.outline_module(settings, ModuleShapes(module, names, shapes))
            for module, names in group(shapes, self.parameters).items()
        }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
