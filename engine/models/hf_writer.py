"""Writes a merged model as a Hugging Face folder: config, tokenizer and safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from polydelta.adapters_store.formats.adapter_folder import new_folder, write_file
from polydelta.adapters_store.merged_model import MergedModel
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.hf_config import bias_keys, model_config
from polydelta.engine.models.hf_folder import GENERATION_CONFIG, INDEX, SINGLE, HfFolder

# Bytes of one safetensors file, unless a single tensor has more. Twice that is held in memory.
SHARD_BYTES = 1 << 30


def write_model(
    folder: Path,
    merged: MergedModel,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the model; the folder appears whole or not at all. Calls `progress(done, total)` after
    each tensor.

    merged: over a layout with the checkpoint's weights. dtype: of what is written. Raises
    ModelError for what a `config.json` cannot say and for numbers that do not fit the dtype,
    StoreError when the folder cannot be written.
    """
    keys, biased_parts = bias_keys(checkpoint.config.family, merged.biased)
    config = model_config(checkpoint) | keys
    config.pop("torch_dtype", None)
    config |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": merged.tied}
    with new_folder(folder) as half_done:
        stored = (
            (name, _stored(name, tensor, dtype))
            for source in (_reported(merged, progress), _zero_biases(merged, biased_parts))
            for name, tensor in source
        )
        _write_tensors(half_done, stored, shard_bytes)
        checkpoint.tokenizer.save(half_done)
        if isinstance(checkpoint.tensors, HfFolder):
            defaults = checkpoint.tensors.path / GENERATION_CONFIG
            if defaults.is_file():
                shutil.copyfile(defaults, half_done / GENERATION_CONFIG)
        _write_json(half_done / "config.json", config)


def _reported(
    merged: MergedModel, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    for done, named in enumerate(merged.tensors(), 1):
        yield named
        if progress is not None:
            progress(done, len(merged))


def _zero_biases(merged: MergedModel, parts: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Biases that a module gets only because another does, the config having one key for both."""
    for module, (out_features, _) in merged.layout.module_shapes.items():
        if module.split(".", 3)[-1] in parts and module not in merged.biased:
            yield f"{module}.bias", torch.zeros(out_features)


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.to(dtype).contiguous()
    if not torch.isfinite(stored).all():
        raise ModelError(
            f"Tensor {name!r} has numbers up to {tensor.abs().max():.3g} once the adapter is in it,"
            f" which {dtype} does not hold: take bfloat16 or float32."
        )
    return stored


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """In one file, or in several with an index."""
    written: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        path = folder / f"{len(written)}.safetensors"
        # As bytes: safetensors' own files can be read by nobody but their owner.
        write_file(path, save(shard, metadata={"format": "pt"}))
        written.append((path, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(written) == 1:
        written[0][0].rename(folder / SINGLE)
        return
    file_of: dict[str, str] = {}
    for number, (path, names) in enumerate(written, 1):
        path.rename(folder / f"model-{number:05}-of-{len(written):05}.safetensors")
        file_of |= dict.fromkeys(names, f"model-{number:05}-of-{len(written):05}.safetensors")
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    nbytes = 0
    for name, tensor in tensors:
        if shard and nbytes + tensor.nbytes > shard_bytes:
            yield shard
            shard, nbytes = {}, 0
        shard[name] = tensor
        nbytes += tensor.nbytes
    yield shard


def _write_json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
