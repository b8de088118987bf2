"""Writes an adapter's folder as PEFT reads it: LoRA or SHiRA, with a scale of 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING
from polydelta.adapters_store.delta import Bias, Delta, LowRank, Sparse
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.adapter_folder import write_folder

_PREFIX = "base_model.model."


def write_adapter(
    folder: Path, modules: Mapping[str, tuple[Delta, ...]], base_name: str, dtype: torch.dtype
) -> None:
    """Writes config and weights; the folder appears whole or not at all.

    modules: as in `Adapter.modules`, all low-rank or all sparse, one delta each; beside a low-rank
    one there may be a bias. base_name: what the config says of the base, a folder or a hub id.
    dtype: of the weights.

    SHiRA's files hold r * (in + out) entries for every module, with one r: where there are fewer,
    entries of 0 fill up. Raises InvalidAdapterError for what no such file can say, StoreError when
    the folder cannot be written.
    """
    low_rank, sparse = _by_kind(modules)
    config, tensors = _lora(low_rank) if low_rank else _shira(sparse)
    tensors = {name: _stored(name, tensor, dtype) for name, tensor in tensors.items()}
    config |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }
    write_folder(folder, config, tensors)


def _by_kind(
    modules: Mapping[str, tuple[Delta, ...]],
) -> tuple[dict[str, tuple[LowRank, Bias | None]], dict[str, Sparse]]:
    """Module path -> its deltas; one of the two is empty. Raises InvalidAdapterError."""
    low_rank: dict[str, tuple[LowRank, Bias | None]] = {}
    sparse: dict[str, Sparse] = {}
    for name, deltas in modules.items():
        match deltas:
            case (LowRank() as delta,):
                low_rank[name] = delta, None
            case (LowRank() as delta, Bias() as bias):
                low_rank[name] = delta, bias
            case (Sparse() as entries,):
                sparse[name] = entries
            case _:
                kinds = [delta.kind for delta in deltas]
                raise InvalidAdapterError(
                    f"Module {name!r} has deltas of kinds {kinds}, but a file of PEFT's holds one "
                    f"for each module, of kind {LowRank.kind} or {Sparse.kind}: merge with a rank "
                    "first."
                )
    if low_rank and sparse:
        raise InvalidAdapterError(
            f"{next(iter(low_rank))!r} has a {LowRank.kind} delta and {next(iter(sparse))!r} a "
            f"{Sparse.kind} one, but a file holds one kind: merge with a rank first."
        )
    if not low_rank and not sparse:
        raise InvalidAdapterError("The adapter changes no module, so there is nothing to write.")
    return low_rank, sparse


def _lora(
    modules: Mapping[str, tuple[LowRank, Bias | None]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    # One key of the config gives all modules a bias or none.
    biased = any(bias is not None for _, bias in modules.values())
    tensors: dict[str, Tensor] = {}
    for name, (delta, bias) in modules.items():
        if name == EMBEDDING:
            if biased:
                raise InvalidAdapterError(
                    f"The adapter changes {name!r} and biases, but PEFT's lora_bias does not go "
                    "with an embedding: write a merged model instead."
                )
            tensors[f"{_PREFIX}{name}.lora_embedding_A"] = delta.a
            tensors[f"{_PREFIX}{name}.lora_embedding_B"] = delta.b
            continue
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = delta.a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = delta.b
        if biased:
            vector = torch.zeros(delta.shape[0]) if bias is None else bias.vector
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = vector
    # The largest, because some servers size their buffers by it.
    rank = max(delta.rank for delta, _ in modules.values())
    # alpha = r everywhere: a reader that knows no patterns still finds a scale of 1.
    pattern = {re.escape(name): d.rank for name, (d, _) in modules.items() if d.rank != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    return config | ({"lora_bias": True} if biased else {}), tensors


def _shira(modules: Mapping[str, Sparse]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    needed = {name: max(1, -(-d.nnz // sum(d.shape))) for name, d in modules.items()}
    widest = max(needed, key=lambda name: needed[name])
    r = needed[widest]
    tensors: dict[str, Tensor] = {}
    for name, delta in modules.items():
        rows, columns = delta.shape
        if r * (rows + columns) > rows * columns:
            raise InvalidAdapterError(
                f"SHiRA has one r for all modules; {widest!r} needs {r}, with which {name!r} would "
                f"have {r * (rows + columns)} entries of {rows * columns}: keep fewer, or merge "
                "with a rank, which writes a LoRA."
            )
        indices, values = _filled_up(delta, r * (rows + columns))
        tensors[f"{_PREFIX}{name}.shira_indices"] = indices
        tensors[f"{_PREFIX}{name}.shira_weight"] = values
    return {"peft_type": "SHIRA", "r": r, "mask_type": "random"}, tensors


def _filled_up(delta: Sparse, count: int) -> tuple[Tensor, Tensor]:
    """Indices `[2, count]` int32, by row and column, and values `[count]`: the delta's own, and
    entries of 0 spread evenly over the free places."""
    columns = delta.shape[1]
    taken = torch.zeros(delta.shape[0] * columns, dtype=torch.bool)
    values = torch.zeros(len(taken), dtype=delta.values.dtype)
    rows = torch.arange(delta.shape[0]).repeat_interleave(delta.row_pointers.diff().long())
    places = rows * columns + delta.columns
    taken[places], values[places] = True, delta.values
    free = (~taken).nonzero().squeeze(1)
    missing = count - delta.nnz
    if missing:
        taken[free[torch.arange(missing) * len(free) // missing]] = True
    chosen = taken.nonzero().squeeze(1)
    return torch.stack((chosen // columns, chosen % columns)).to(torch.int32), values[chosen]


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As it goes into the file. Raises InvalidAdapterError when numbers do not fit the dtype."""
    if not tensor.dtype.is_floating_point:
        return tensor.contiguous()
    # A copy: modules may share a tensor, which a file cannot.
    stored = tensor.to(dtype, copy=True).contiguous()
    if not torch.isfinite(stored).all():
        raise InvalidAdapterError(
            f"dtype is {dtype}, but tensor {name!r} has numbers up to {tensor.abs().max():.3g}, "
            "which do not fit: take bfloat16 or float32, or smaller weights."
        )
    return stored
