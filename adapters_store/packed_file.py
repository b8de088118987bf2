"""The packed form of an adapter as a file, so that loading it again is one sequential read.

    magic | sha256 of the header | length of the header (8 bytes, little-endian) | header (JSON)
    padding | layers | prefix

A layer starts at a multiple of ALIGNMENT, as its tensors do within it. Layers whose tensors lie
alike share one description. The file is a cache of what `packing.pack` makes: written whole or not
at all; one that is not understood, or that the disk has damaged, is made anew. Layers and prefix
are only summed up: to digest them takes longer than to read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from polydelta.adapters_store.packed import PackedAdapter, PackedLayer, PackedPrefix
from polydelta.adapters_store.packed_deltas import LowRankBlock, PackedDelta
from polydelta.adapters_store.packed_tensors import (
    ALIGNMENT,
    PackedMatrix,
    PackedQuantizedMatrix,
    PackedVector,
)

# The digit changes with the layout of the file or of what is packed.
MAGIC = b"polydelta-packed-6\n"

# Sums are kept modulo this.
_SUMS = 1 << 64

_TYPES = {
    kind.__name__: kind
    for kind in (
        LowRankBlock,
        PackedMatrix,
        PackedQuantizedMatrix,
        PackedVector,
        *get_args(PackedDelta),
    )
}


class UnreadableFileError(Exception):
    """The file is not there, not whole, or of another version of this program."""


def write_packed(packed: PackedAdapter, path: Path) -> None:
    """Writes a file that appears under its name only when it is complete. Raises OSError."""
    layouts: list[Any] = []
    layers: list[dict[str, int]] = []
    for layer in packed.layers:
        layout = _encode(layer.deltas)
        if layout not in layouts:
            layouts.append(layout)
        layers.append({"nbytes": layer.data.numel(), "layout": layouts.index(layout)})
    data = [layer.data for layer in packed.layers]
    if packed.prefix is not None:
        data.append(_bytes(packed.prefix.values))
    content = {
        "digest": packed.digest,
        "dtype": _encode(packed.dtype),
        "layouts": layouts,
        "layers": layers,
        "prefix": None if packed.prefix is None else list(packed.prefix.values.shape),
        "invocation": list(packed.invocation),
        "sum": sum(map(_sum, data)) % _SUMS,
    }
    header = json.dumps(content, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + hashlib.sha256(header).digest())
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(bytes(-file.tell() % ALIGNMENT))
            for piece in data:
                file.write(piece.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_packed(path: Path) -> PackedAdapter:
    """The adapter, in memory of its own, in one piece. Raises UnreadableFileError."""
    # Read and not mapped: rank 64 on the default model takes 5 ms instead of 20, from a disk 33
    # instead of 79; and a mapped file that somebody cuts short would kill the process.
    with _reading(path) as file:
        header = _read_header(file)
        memory = _memory(header.nbytes)
        if file.readinto(memory.numpy().data) != memory.numel():
            raise ValueError("cut short while it was read")
        # A damaged index would lead a kernel anywhere.
        if _sum(memory) % _SUMS != header.sum:
            raise ValueError("its data is damaged")
        *layers, prefix = memory.split([*header.sizes, header.prefix_bytes])
        return PackedAdapter(
            header.digest,
            header.dtype,
            tuple(map(PackedLayer, layers, header.deltas)),
            _prefix(prefix, header.dtype, header.prefix),
            header.invocation,
        )


def packed_digest(path: Path) -> str:
    """The content that a whole file was made from; only its header is read. Raises
    UnreadableFileError."""
    with _reading(path) as file:
        return _read_header(file).digest


def in_memory(packed: PackedAdapter, pin: bool = False) -> PackedAdapter:
    """The same adapter in one piece of memory, as it may be already; page-locked with `pin`, so
    that a GPU copies it without waiting."""
    prefix = packed.prefix
    pieces = [layer.data for layer in packed.layers]
    if prefix is not None:
        pieces.append(_bytes(prefix.values))
    if not pin and len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1:
        return packed
    sizes = [piece.numel() for piece in pieces]
    total = sum(sizes)
    memory = torch.empty(total, dtype=torch.uint8, pin_memory=True) if pin else _memory(total)
    copies = memory.split(sizes)
    for copy, piece in zip(copies, pieces, strict=True):
        # By numpy and not by torch: torch's copy would start a team of OpenMP threads here.
        copy.numpy()[:] = piece.numpy()
    deltas = (layer.deltas for layer in packed.layers)
    # The prefix is what is left over, where there is one.
    layers = map(PackedLayer, copies, deltas)
    shape = None if prefix is None else tuple(prefix.values.shape)
    return replace(packed, layers=tuple(layers), prefix=_prefix(copies[-1], packed.dtype, shape))


def _memory(nbytes: int) -> Tensor:
    """`[nbytes]` uint8, not written yet, aligned to a page of the system's.

    In huge pages where the system has them: otherwise most of the time of a load goes into the page
    faults of its new memory (39 MB: 20 ms, of which 16 are faults).
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _bytes(values: Tensor) -> Tensor:
    """values: contiguous."""
    return values.flatten().view(torch.uint8)


def _sum(data: Tensor) -> int:
    """Of bytes `[n]` taken as numbers of 64 bits. Modulo _SUMS, pieces whose lengths are multiples
    of 8 (but for the last) have together the sum of what they are pieces of. 39 MB take 1 ms."""
    content = data.numpy()
    whole = len(content) // 8 * 8
    # By numpy and not by torch, for the reason given in `in_memory`.
    words = content[:whole].view(np.uint64)
    return int(words.sum()) + int.from_bytes(content[whole:].tobytes(), "little")


def _prefix(
    memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None
) -> PackedPrefix | None:
    """memory: its bytes, [nbytes] uint8."""
    return None if shape is None else PackedPrefix(memory.view(dtype).view(shape))


@dataclass(frozen=True)
class _Header:
    """What a file says of its layers."""

    digest: str
    dtype: torch.dtype
    # In bytes, and how its tensors lie, of each layer.
    sizes: list[int]
    deltas: list[Any]
    # Shape of the prefix's values.
    prefix: tuple[int, ...] | None
    invocation: tuple[int, ...]
    # Of all bytes after the header.
    sum: int

    @property
    def prefix_bytes(self) -> int:
        return 0 if self.prefix is None else prod(self.prefix) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return sum(self.sizes) + self.prefix_bytes


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BufferedReader]:
    """Whatever fails meanwhile is an UnreadableFileError."""
    try:
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UnreadableFileError(str(error)) from None


def _read_header(file: BufferedReader) -> _Header:
    """The file stands at its first layer after that, and has as many bytes left as it should."""
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError("another kind of file, or of another version")
    digest, length = file.read(32), int.from_bytes(file.read(8), "little")
    header = file.read(min(length, os.fstat(file.fileno()).st_size))
    if hashlib.sha256(header).digest() != digest:
        raise ValueError("the header is damaged")
    file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
    content = _decode(json.loads(header))
    result = _Header(
        content["digest"],
        content["dtype"],
        [layer["nbytes"] for layer in content["layers"]],
        [content["layouts"][layer["layout"]] for layer in content["layers"]],
        content["prefix"],
        content["invocation"],
        content["sum"],
    )
    left = os.fstat(file.fileno()).st_size - file.tell()
    if left != result.nbytes:
        raise ValueError(f"{left} bytes of data instead of {result.nbytes}")
    return result


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
