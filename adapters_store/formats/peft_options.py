"""What the configs of several of PEFT's tuners have in common."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

from polydelta.adapters_store.base_layout import EMBEDDING, BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_config import Config
from polydelta.adapters_store.formats.peft_format import ModuleShapes
from polydelta.adapters_store.reference import CONFIG_FILE

# Which modules were adapted; the tensors' names say it.
MODULE_CHOICE = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform"})

# What a generator of random numbers takes.
_SEEDS = range(-(1 << 63), 1 << 64)


def one_of(field: str, value: object, choices: tuple[str, ...]) -> str:
    """Raises InvalidAdapterError for anything but one of them."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} is {reprlib.repr(value)}, but must be one of "
            f"{', '.join(choices)}."
        )
    return value


def seed(field: str, value: object) -> int:
    """Raises InvalidAdapterError for anything but an integer of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or value not in _SEEDS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} is {reprlib.repr(value)}, but must be a whole number of 64 "
            "bits."
        )
    return value


def refuse_trained_biases(config: Config) -> None:
    """Raises InvalidAdapterError when `bias` says that biases of the base were trained too."""
    if config.get("bias") not in (None, "none"):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: bias is {reprlib.repr(config['bias'])}; trained biases of the base "
            "are not served yet: train with bias='none'."
        )


def refuse_surplus(shapes: ModuleShapes, parameter: str, why: str) -> None:
    """why: what in the config says that there is none. Raises InvalidAdapterError for a parameter
    that the file has all the same."""
    if parameter in shapes:
        raise InvalidAdapterError(
            f"Module {shapes.module!r} has {parameter}, but {why} in {CONFIG_FILE}: the weights "
            "belong to another config; save the adapter again from the trained model."
        )


def linear_layers(layout: BaseLayout) -> Mapping[str, object]:
    """What tuners of linear layers alone may change: all targets but the embedding."""
    return {name: shape for name, shape in layout.target_shapes.items() if name != EMBEDDING}
