"""The packed form of an adapter as a file, so that loading it again is one sequential read.

    magic | sha256 of the header | length of the header (8 bytes, little-endian) | header (JSON)
    padding | layers

A layer starts at a multiple of ALIGNMENT, as its tensors do within it. The file is a cache of what
`packing.pack` makes: written whole or not at all; one that is not understood is made anew. A header
that the disk has damaged is noticed; damaged layers are not, because they are not read here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polydelta.adapters_store.packing import (
    ALIGNMENT,
    LowRankBlock,
    PackedAdapter,
    PackedLayer,
    PackedLowRank,
    PackedMatrix,
    PackedSparse,
    PackedVector,
)

# The digit changes with the layout of the file or of what is packed.
MAGIC = b"polydelta-packed-2\n"

_TYPES = {
    kind.__name__: kind
    for kind in (LowRankBlock, PackedLowRank, PackedMatrix, PackedSparse, PackedVector)
}


class UnreadableFileError(Exception):
    """The file is not there, not whole, or of another version of this program."""


def write_packed(packed: PackedAdapter, path: Path) -> None:
    """Writes a file that appears under its name only when it is complete. Raises OSError."""
    layers, offset = [], 0
    for layer in packed.layers:
        layers.append({"offset": offset, "nbytes": layer.data.numel(), "deltas": layer.deltas})
        offset += layer.data.numel()
    content = {"digest": packed.digest, "dtype": packed.dtype, "nbytes": offset, "layers": layers}
    header = json.dumps(_encode(content), separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + hashlib.sha256(header).digest())
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(bytes(-file.tell() % ALIGNMENT))
            for layer in packed.layers:
                file.write(layer.data.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_packed(path: Path) -> PackedAdapter:
    """The adapter, its data mapped from the file and not read yet. Raises UnreadableFileError."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        header, start = _header(mapped)
        content = _decode(header)
        data = torch.frombuffer(mapped, dtype=torch.uint8)[start:]
        if data.numel() != content["nbytes"]:
            raise ValueError(f"{data.numel()} bytes of data instead of {content['nbytes']}")
        layers = tuple(_layer(data, layer) for layer in content["layers"])
        return PackedAdapter(content["digest"], content["dtype"], layers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableFileError(str(error)) from None


def in_memory(packed: PackedAdapter, pin: bool = False) -> PackedAdapter:
    """The same adapter in memory of its own, in one piece; page-locked with `pin`, so that a GPU
    copies it without waiting."""
    total = sum(layer.data.numel() for layer in packed.layers)
    memory = torch.empty(total, dtype=torch.uint8, pin_memory=pin)
    layers, start = [], 0
    for layer in packed.layers:
        data = memory[start : start + layer.data.numel()]
        # By numpy and not by torch: torch's copy would start a team of OpenMP threads here.
        data.numpy()[:] = layer.data.numpy()
        layers.append(PackedLayer(data, layer.deltas))
        start += layer.data.numel()
    return PackedAdapter(packed.digest, packed.dtype, tuple(layers))


def _layer(data: Tensor, layer: dict[str, Any]) -> PackedLayer:
    start = layer["offset"]
    return PackedLayer(data[start : start + layer["nbytes"]], layer["deltas"])


def _header(mapped: mmap.mmap) -> tuple[Any, int]:
    """The header, and where the data begins."""
    if mapped[: len(MAGIC)] != MAGIC:
        raise ValueError("another kind of file, or of another version")
    mapped.seek(len(MAGIC))
    digest, length = mapped.read(32), int.from_bytes(mapped.read(8), "little")
    start = mapped.tell()
    header = mapped[start : start + length]
    if hashlib.sha256(header).digest() != digest:
        raise ValueError("the header is damaged")
    end = start + len(header)
    return json.loads(header), end + -end % ALIGNMENT


def _encode(value: Any) -> Any:
    """Dataclasses as objects that name their type, dtypes by name."""
    if is_dataclass(value):
        named = {field.name: _encode(getattr(value, field.name)) for field in fields(value)}
        return {"type": type(value).__name__, **named}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return {"dtype": str(value)} if isinstance(value, torch.dtype) else value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype"} and isinstance(value["dtype"], str):
        return getattr(torch, value["dtype"].removeprefix("torch."))
    decoded = {key: _decode(item) for key, item in value.items()}
    kind = decoded.pop("type", None)
    return decoded if kind is None else _TYPES[kind](**decoded)
