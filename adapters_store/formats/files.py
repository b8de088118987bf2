"""The files of one adapter folder, as bytes, headers and tensors. Nothing here knows a format.

Messages name files, never folders: they go to clients.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.safetensors_header import Header, read_header
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

PICKLE_FILE = "adapter_model.bin"

# PEFT's own configs are some kilobytes; one that lists every module of a large model, some hundred.
MAX_CONFIG_BYTES = 1 << 20

# Bytes that are read at a time of a file that is not kept in memory.
CHUNK_BYTES = 1 << 20

Shape = tuple[int, ...]

_RESAVE = "save the adapter again with `save_pretrained(..., safe_serialization=True)`"


def read_config_bytes(folder: Path) -> bytes:
    """Raises InvalidAdapterError when the config cannot be read or is too large."""
    try:
        with open(folder / CONFIG_FILE, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InvalidAdapterError(_unreadable(CONFIG_FILE, error)) from None
    if len(content) > MAX_CONFIG_BYTES:
        raise InvalidAdapterError(
            f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes: shorten its lists of modules."
        )
    return content


def read_weights_bytes(folder: Path) -> bytes:
    """The whole file, once its header is known to fit its size. Raises InvalidAdapterError when it
    cannot be read, is no safetensors file, or is a pickle by name."""
    try:
        with open(_weights_path(folder), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check_header(file, size)
            file.seek(0)
            return file.read(size)
    except OSError as error:
        raise InvalidAdapterError(_unreadable(WEIGHTS_FILE, error)) from None


def parse_weights(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in their stored dtypes, in memory of their own.

    The file is parsed from bytes and not mapped: a mapped file that somebody cuts short would kill
    the process, and the bytes that were digested are the ones that are served.
    Raises InvalidAdapterError.
    """
    _check_header(BytesIO(content), len(content))
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidAdapterError(_not_safetensors(content[:2], error)) from None


def read_shapes(folder: Path) -> dict[str, Shape]:
    """Tensor names and shapes, from the header alone. Raises InvalidAdapterError."""
    try:
        with open(_weights_path(folder), "rb") as file:
            header = _check_header(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise InvalidAdapterError(_unreadable(WEIGHTS_FILE, error)) from None
    return {name: tensor.shape for name, tensor in header.tensors.items()}


def content_digest(config: bytes, weights: bytes) -> str:
    """sha256, in hex, of an adapter's content. Lengths separate the files, so that no bytes can
    move from one to the other unnoticed."""
    digest = hashlib.sha256()
    for content in (config, weights):
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """The `content_digest` of a folder's files, which are read in chunks.

    Raises InvalidAdapterError when they cannot be read.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            with open(folder / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                for chunk in read_chunks(file):
                    digest.update(chunk)
                done = file.tell()
        except OSError as error:
            raise InvalidAdapterError(_unreadable(name, error)) from None
        if done != size:
            raise InvalidAdapterError(f"{name} has changed while it was read: ask again.")
    return digest.hexdigest()


def read_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, in pieces of CHUNK_BYTES."""
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def to_float32(name: str, tensor: Tensor) -> Tensor:
    """Any floating-point dtype, float8 included, as float32.

    Raises InvalidAdapterError for other dtypes and for values that are not finite.
    """
    if not tensor.dtype.is_floating_point:
        raise InvalidAdapterError(
            f"Tensor {name!r} is {tensor.dtype}: weights must be floating-point numbers."
        )
    values = tensor.to(torch.float32)
    if not all_finite(values):
        raise InvalidAdapterError(
            f"Tensor {name!r} has NaN or infinite values: the training run that wrote it diverged; "
            "take an earlier checkpoint."
        )
    return values


def all_finite(values: Tensor) -> bool:
    """values: of floats, and not copied, as torch.isfinite does twice."""
    return not values.numel() or all(math.isfinite(extreme) for extreme in values.aminmax())


def _check_header(file: BinaryIO, size: int) -> Header:
    try:
        return read_header(file, size)
    except ValueError as error:
        file.seek(0)
        raise InvalidAdapterError(_not_safetensors(file.read(2), error)) from None


def _weights_path(folder: Path) -> Path:
    if not (folder / WEIGHTS_FILE).exists():
        if (folder / PICKLE_FILE).exists():
            raise InvalidAdapterError(
                f"{PICKLE_FILE} is a pickle, which can run code when read, and is never opened: "
                f"{_RESAVE}."
            )
        raise InvalidAdapterError(f"{WEIGHTS_FILE} is missing: {_RESAVE}.")
    return folder / WEIGHTS_FILE


def _unreadable(name: str, error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"{name} cannot be read ({reason}): check that the file is there and readable."


def _not_safetensors(start: bytes, error: Exception) -> str:
    # Only asked once the header has proven wrong: a good file may begin with these bytes too.
    if start[:1] == b"\x80" or start == b"PK":
        return f"{WEIGHTS_FILE} is a pickle under another name and is never opened: {_RESAVE}."
    return (
        f"{WEIGHTS_FILE} is not a complete safetensors file ({error}): copy it again, or {_RESAVE}."
    )
