"""Adapters' deltas in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.kernels.delta_weights import (
    AddWeights,
    ChangeWeights,
    CirculantWeights,
    ColumnsWeights,
    KroneckerWeights,
    LowRankWeights,
    OneBitWeights,
    RotateWeights,
    RowsWeights,
    ScaleWeights,
    SparseWeights,
    TopKWeights,
    dense,
)


def add_delta(weights: AddWeights, y: Tensor, x: Tensor) -> None:
    """`y += f(x)`; y: `[tokens, out]`, x: `[tokens, in]`."""
    match weights:
        case LowRankWeights():
            _add_low_rank(weights, y, x)
        case SparseWeights():
            counts = weights.row_pointers.diff().long()
            rows = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
            y.index_add_(1, rows, x[:, weights.columns.long()] * weights.values)
        case ColumnsWeights(out_start, indices, block_t):
            _columns(y, out_start, block_t.shape[1]).add_(x[:, indices.long()] @ block_t)
        case RowsWeights(indices, block):
            y.index_add_(1, indices, x @ block.T)
        case OneBitWeights(out_start, bits, scale):
            signs = unpacked_signs(bits, x.shape[1], x.dtype)
            _columns(y, out_start, len(bits)).add_((x @ signs.T) * scale)
        case KroneckerWeights(out_start, left, right):
            # [tokens, b, d] -> [tokens, a, c]
            blocks = x.unflatten(1, (left.shape[1], right.shape[1]))
            mixed = (left @ (blocks @ right.T)).flatten(1)
            _columns(y, out_start, mixed.shape[1]).add_(mixed)
        case CirculantWeights(out_start, kernel):
            added = _circulant(kernel, x)
            _columns(y, out_start, added.shape[1]).add_(added)
        case TopKWeights(out_start, keep, a, bias, b_t):
            added = _kept(x @ a.T, bias, keep) @ b_t
            _columns(y, out_start, added.shape[1]).add_(added)


def change_output(weights: ChangeWeights, y: Tensor) -> None:
    """`y = f(y)`, in float32; y: `[tokens, out]`."""
    match weights:
        case ScaleWeights(out_start, vector):
            _columns(y, out_start, len(vector)).mul_(vector)
        case RotateWeights(out_start, cos, sin, partner):
            part = _columns(y, out_start, len(cos))
            part.copy_(part * cos + part.index_select(1, partner) * sin)


def unpacked_signs(bits: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """`[out, in]`, 1 and -1, of `OneBitWeights.bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones = (bits.unsqueeze(-1) >> places & 1).flatten(1)[:, :in_features]
    return ones.to(dtype) * 2 - 1


def _add_low_rank(weights: LowRankWeights, y: Tensor, x: Tensor) -> None:
    shrunk = x @ dense(weights.a, x.dtype).T
    for block in weights.blocks:
        rank, out_features = block.b_t.shape
        ranks = slice(block.rank_start, block.rank_start + rank)
        _columns(y, block.out_start, out_features).add_(
            shrunk[:, ranks] @ dense(block.b_t, x.dtype)
        )


def _circulant(kernel: Tensor, x: Tensor) -> Tensor:
    """`[tokens, out]` float32, by the discrete Fourier transform, which makes products of
    correlations; kernel: `[rows, columns, size]`."""
    size = kernel.shape[2]
    inputs = torch.fft.rfft(x.float().unflatten(1, (-1, size)))
    weights = torch.fft.rfft(kernel.float()).conj()
    outputs = torch.einsum("inf,tnf->tif", weights, inputs)
    added: Tensor = torch.fft.irfft(outputs, size).flatten(1)
    return added


def _kept(shrunk: Tensor, bias: Tensor, keep: int) -> Tensor:
    """shrunk: [tokens, rank]; 0 but for the chosen entries."""
    chosen = (shrunk + bias).abs().topk(keep, sorted=False).indices
    return torch.zeros_like(shrunk).scatter_(1, chosen, shrunk.gather(1, chosen))


def _columns(y: Tensor, start: int, count: int) -> Tensor:
    return y.narrow(1, start, count)
