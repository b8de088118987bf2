"""Tensors that say which rows, columns or entries of a weight change."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError


def whole_numbers(name: str, indices: Tensor) -> Tensor:
    """As int64. Raises InvalidAdapterError for a tensor of another type."""
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise InvalidAdapterError(f"Tensor {name!r} is {indices.dtype}: indices must be integers.")
    return indices.to(torch.int64)


def positions(name: str, indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """indices: [k] integers in any order -> ascending, `[k]` int32, and the order that sorts them.

    size: how many rows or columns the base's layer has. Raises InvalidAdapterError for tensors of
    another type, and for indices outside of the layer or given twice.
    """
    ascending, order = whole_numbers(name, indices).sort()
    if not len(ascending):
        raise InvalidAdapterError(
            f"Tensor {name!r} is empty, so it changes nothing: leave the module out."
        )
    if ascending[0] < 0 or ascending[-1] >= size:
        raise InvalidAdapterError(
            f"Tensor {name!r} points outside of the {size} that the base model's layer has: the "
            "adapter was made for another base."
        )
    if (ascending.diff() == 0).any():
        raise InvalidAdapterError(
            f"Tensor {name!r} has an index twice, so its values are not certain: save the adapter "
            "again from the trained model."
        )
    return ascending.to(torch.int32), order
