"""The header of a safetensors file (github.com/huggingface/safetensors), checked as if its writer
meant harm: nothing is allocated for what the header says before what it says has been checked.

    length: 8 bytes, little-endian | JSON of that length | data: every tensor's bytes, no gaps
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from polydelta.adapters_store.formats.strict_json import parse_json

# A LoRA on every expert of a large mixture has some forty thousand tensors: 6 MB of header.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48
# Names are quoted in messages, and kept in memory once for each module.
MAX_NAME_LENGTH = 256

# The dtypes that are read. Those of less than a byte, complex ones and bare exponents are not.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes `begin` to `end` of the data."""

    # As the file writes it: a key of DTYPE_BYTES.
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself; its tensors fill its data exactly."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO, size: int) -> Header:
    """Reads a file's header, from where the file stands, which must be its start.

    size: of the whole file, in bytes. Raises ValueError with what is wrong.
    """
    start = file.read(_LENGTH_BYTES)
    if len(start) < _LENGTH_BYTES:
        raise ValueError(f"it has {len(start)} bytes, too few for a header")
    length, room = int.from_bytes(start, "little"), size - _LENGTH_BYTES
    if length > room:
        raise ValueError(f"its header claims {length} bytes, but {room} follow")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
    content = file.read(length)
    if len(content) < length:
        raise ValueError("it became shorter while it was read")
    # A list takes twenty times the memory of its two characters, so they are counted first: each
    # tensor has three brackets, and its name may have some too.
    if content.count(b"{") + content.count(b"[") > 8 * MAX_TENSORS:
        raise ValueError(f"its header lists more than {MAX_TENSORS} tensors")
    try:
        entries = parse_json(content)
    except ValueError as error:
        raise ValueError(f"its header is not valid JSON: {error}") from None
    return _parse(entries, room - length)


def _parse(entries: Any, data_bytes: int) -> Header:
    if not isinstance(entries, dict):
        raise ValueError(f"its header is {reprlib.repr(entries)} instead of an object")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{_METADATA} in its header may hold only text")
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"its header lists {len(entries)} tensors, more than {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    _check_places(tensors, data_bytes)
    return Header(tensors, metadata)


def _tensor(name: str, entry: Any) -> StoredTensor:
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(
            f"the tensor name {name[:80]!r} is too long or has characters that cannot be shown"
        )
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(
            f"tensor {name!r} is described by {reprlib.repr(entry)} instead of dtype, shape and "
            "data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(
            f"tensor {name!r} has dtype {reprlib.repr(dtype)}, which is not one of "
            f"{', '.join(DTYPE_BYTES)}"
        )
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"tensor {name!r} has shape {reprlib.repr(shape)} instead of up to {MAX_DIMENSIONS} "
            "whole numbers"
        )
    # Zeros count as ones, or they would hide numbers that are too large for anybody's arithmetic.
    if math.prod(max(dimension, 1) for dimension in shape) > MAX_ELEMENTS:
        raise ValueError(
            f"tensor {name!r} has shape {reprlib.repr(shape)}, more than {MAX_ELEMENTS} numbers"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(
            f"tensor {name!r} has data_offsets {reprlib.repr(offsets)} instead of a begin and an "
            "end"
        )
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise ValueError(
            f"tensor {name!r} has data_offsets {reprlib.repr(offsets)}, but shape {shape} of "
            f"{dtype} takes {nbytes} bytes"
        )
    return StoredTensor(dtype, tuple(shape), begin, end)


def _check_places(tensors: Mapping[str, StoredTensor], data_bytes: int) -> None:
    """Each byte of the data belongs to exactly one tensor."""
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            what = "overlaps another one" if tensor.begin < position else "leaves a gap before it"
            raise ValueError(
                f"tensor {name!r} {what}: it begins at byte {reprlib.repr(tensor.begin)} of the "
                f"data, not at {position}"
            )
        if tensor.end > data_bytes:
            raise ValueError(
                f"tensor {name!r} ends at byte {reprlib.repr(tensor.end)} of the data, which has "
                f"{data_bytes}"
            )
        position = tensor.end
    if position != data_bytes:
        raise ValueError(f"its tensors take {position} bytes, but its data has {data_bytes}")


def _whole_numbers(value: Any) -> bool:
    # `type`, because a truth value is an int too.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
