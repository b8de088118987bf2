"""Writes an adapter's folder as PEFT lays it out, whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from polydelta.adapters_store.errors import StoreError
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; parent folders are made.

    config: of values that JSON has. tensors: by their names in the file, each with memory of its
    own. Raises StoreError when something is there already, or when the folder cannot be written.
    """
    with new_folder(folder) as half_done:
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        # As bytes: safetensors' own files can be read by nobody but their owner.
        write_file(half_done / WEIGHTS_FILE, save(stored, metadata={"format": "pt"}))
        write_file(half_done / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to write into, which takes its name and place once all is written; parent
    folders are made. Raises StoreError as `write_folder` does."""
    check_free(folder)
    folder = folder.absolute()
    # A sibling, so that the rename stays within one file system; hidden, so that nobody lists it.
    half_done = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    try:
        half_done.mkdir(parents=True)
        yield half_done
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


def write_file(path: Path, content: bytes) -> None:
    """Returns when it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
