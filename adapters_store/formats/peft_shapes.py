"""Shapes whose sizes the file alone says."""

from __future__ import annotations

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.peft_format import ModuleShapes


def dimensions(shapes: ModuleShapes, parameter: str, count: int) -> Shape:
    """A tensor's shape. Raises InvalidAdapterError when it does not have `count` dimensions."""
    shape = shapes[parameter]
    if len(shape) != count:
        raise InvalidAdapterError(
            f"Module {shapes.module!r} has a {parameter} of shape {list(shape)}, but it must have "
            f"{count} dimensions: save the adapter again from the trained model."
        )
    return shape
