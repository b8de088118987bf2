"""Writes an adapter's folder as PEFT reads it: LoRA or SHiRA, with a scale of 1."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from polydelta.adapters_store.delta import Delta, LowRank, Sparse
from polydelta.adapters_store.errors import InvalidAdapterError, StoreError
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

_PREFIX = "base_model.model."


def write_adapter(
    folder: Path, modules: Mapping[str, tuple[Delta, ...]], base_name: str, dtype: torch.dtype
) -> None:
    """Writes config and weights; the folder appears whole or not at all.

    modules: as in `Adapter.modules`, all low-rank or all sparse, one delta each. base_name: what
    the config says of the base, a folder or a hub id. dtype: of the weights.

    SHiRA's files hold r * (in + out) entries for every module, with one r: where there are fewer,
    entries of 0 fill up. Raises InvalidAdapterError for what no such file can say, StoreError when
    the folder cannot be written.
    """
    check_free(folder)
    low_rank, sparse = _by_kind(modules)
    config, tensors = _lora(low_rank) if low_rank else _shira(sparse)
    tensors = {name: _stored(name, tensor, dtype) for name, tensor in tensors.items()}
    config |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }
    folder = folder.absolute()
    # A sibling, so that the rename stays within one file system; hidden, so that nobody lists it.
    half_done = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    try:
        half_done.mkdir(parents=True)
        # As bytes: safetensors' own files can be read by nobody but their owner.
        _write(half_done / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        _write(half_done / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode())
        half_done.rename(folder)
    except OSError as error:
        raise StoreError(
            f"folder {str(folder)!r} cannot be written ({error.strerror or error}): make room, or "
            "name another."
        ) from None
    finally:
        shutil.rmtree(half_done, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raises StoreError when something is there already, other than an empty folder."""
    try:
        taken = any(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(
            f"folder {str(folder)!r} cannot be looked into ({error.strerror}): name another."
        ) from None
    if taken:
        raise StoreError(
            f"folder {str(folder)!r} is not empty, and nothing is written over: name another, or "
            "remove it first."
        )


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _by_kind(
    modules: Mapping[str, tuple[Delta, ...]],
) -> tuple[dict[str, LowRank], dict[str, Sparse]]:
    """Module path -> its delta; one of the two is empty. Raises InvalidAdapterError."""
    low_rank: dict[str, LowRank] = {}
    sparse: dict[str, Sparse] = {}
    for name, deltas in modules.items():
        kinds = [delta.kind for delta in deltas]
        if len(deltas) == 1 and isinstance(deltas[0], LowRank):
            low_rank[name] = deltas[0]
        elif len(deltas) == 1 and isinstance(deltas[0], Sparse):
            sparse[name] = deltas[0]
        else:
            raise InvalidAdapterError(
                f"Module {name!r} has deltas of kinds {kinds}, but a file of PEFT's holds one for "
                f"each module, of kind {LowRank.kind} or {Sparse.kind}: merge with a rank first."
            )
    if low_rank and sparse:
        raise InvalidAdapterError(
            f"{next(iter(low_rank))!r} has a {LowRank.kind} delta and {next(iter(sparse))!r} a "
            f"{Sparse.kind} one, but a file holds one kind: merge with a rank first."
        )
    if not low_rank and not sparse:
        raise InvalidAdapterError("The adapter changes no module, so there is nothing to write.")
    return low_rank, sparse


def _lora(modules: Mapping[str, LowRank]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for name, delta in modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = delta.a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = delta.b
    # The largest, because some servers size their buffers by it.
    rank = max(delta.rank for delta in modules.values())
    # alpha = r everywhere: a reader that knows no patterns still finds a scale of 1.
    pattern = {re.escape(name): d.rank for name, d in modules.items() if d.rank != rank}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    return config, tensors


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
    stored = tensor.to(dtype).contiguous()
    if not torch.isfinite(stored).all():
        raise InvalidAdapterError(
            f"dtype is {dtype}, but tensor {name!r} has numbers up to {tensor.abs().max():.3g}, "
            "which do not fit: take bfloat16 or float32, or smaller weights."
        )
    return stored
