"""The weight that a linear layer's deltas amount to: what applying them unmerged must equal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Bias, Delta, Rotate, Scale, Side, TopK
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.linear_deltas import Matrix


def merge_into(
    weight: Tensor, bias: Tensor | None, deltas: Iterable[Delta]
) -> tuple[Tensor, Tensor | None]:
    """weight `[out, in]` and bias `[out]`, both float32 or both float64, with the deltas in them.

    Raises InvalidAdapterError for a kind that no weight amounts to.
    """
    matrices: list[Tensor] = []
    biases: list[Tensor] = []
    for delta in deltas:
        match delta:
            case Scale(vector, Side.INPUT):
                weight = weight * vector
            case Scale(vector, Side.OUTPUT):
                weight = weight * vector.unsqueeze(1)
                bias = None if bias is None else bias * vector
            case Rotate():
                weight = _rotated(delta, weight)
                bias = None if bias is None else _rotated(delta, bias.unsqueeze(1)).squeeze(1)
            case Bias(vector):
                biases.append(vector)
            case _ if isinstance(delta, Matrix):
                matrices.append(delta.dense())
            case _:
                why = " (it is not linear in the layer's input)" if isinstance(delta, TopK) else ""
                raise InvalidAdapterError(
                    f"Deltas of kind {delta.kind} cannot be merged into a weight{why}: serve the "
                    "adapter unmerged."
                )
    for matrix in matrices:
        weight = weight + matrix.to(weight.dtype)
    for vector in biases:
        bias = vector.to(weight.dtype) if bias is None else bias + vector
    return weight, bias


def _rotated(rotate: Rotate, outputs: Tensor) -> Tensor:
    """outputs: [out, *]."""
    cos, sin = rotate.cos.unsqueeze(1), rotate.sin.unsqueeze(1)
    return cos * outputs + sin * torch.index_select(outputs, 0, rotate.partner)
