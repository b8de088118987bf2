"""From entries in any order, or a matrix, to the CSR form of a sparse delta."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Sparse
from polydelta.adapters_store.errors import InvalidAdapterError


def sparse_from_entries(
    name: str, indices: Tensor, values: Tensor, shape: tuple[int, int]
) -> Sparse:
    """indices: [2, nnz] int64, rows and columns in any order, from the tensor `name`; values: [nnz]
    float32.

    Raises InvalidAdapterError for an entry outside of `shape`, and for one that is named twice.
    """
    bounds = torch.tensor(shape).unsqueeze(1)
    if ((indices < 0) | (indices >= bounds)).any():
        raise InvalidAdapterError(
            f"Tensor {name!r} points outside of the base model's layer of shape {list(shape)}: "
            "the adapter was trained on another base."
        )
    rows, columns = indices
    places, order = (rows * shape[1] + columns).sort()
    if (places.diff() == 0).any():
        raise InvalidAdapterError(
            f"Tensor {name!r} names an entry twice, so its value is not certain: save the adapter "
            "again from the trained model."
        )
    row_pointers = torch.zeros(shape[0] + 1, dtype=torch.int32)
    row_pointers[1:] = rows.bincount(minlength=shape[0]).cumsum(0)
    return Sparse(shape, row_pointers, columns[order].to(torch.int32), values[order])


def sparse_from_matrix(matrix: Tensor) -> Sparse:
    """matrix: `[out, in]` float32, of which the entries that are not 0 stay."""
    # Row by row: the places of all at once take four times what is made of them.
    columns = [row.nonzero().squeeze(1).to(torch.int32) for row in matrix]
    values = [row[places] for row, places in zip(matrix, columns, strict=True)]
    row_pointers = torch.zeros(len(matrix) + 1, dtype=torch.int32)
    row_pointers[1:] = torch.tensor([len(places) for places in columns]).cumsum(0)
    return Sparse(
        (matrix.shape[0], matrix.shape[1]), row_pointers, torch.cat(columns), torch.cat(values)
    )
