"""What users upload: adapters from a folder, each time with content that no version has yet."""

from __future__ import annotations

import json
import random
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Length of a safetensors file's header, which is JSON, in its first eight bytes.
HEADER_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Form:
    """A body of `POST /v1/adapters` and `PUT /v1/adapters/{id}`."""

    content_type: str
    body: bytes


class AdapterFiles:
    """The two files of each adapter in a folder, in memory."""

    def __init__(self, folder: Path) -> None:
        """folder: an adapter, or a folder of adapters.

        Raises ValueError when there is none, OSError when one cannot be read.
        """
        configs = sorted([*folder.glob(CONFIG_FILE), *folder.glob(f"*/{CONFIG_FILE}")])
        self._adapters = [
            (config.read_bytes(), weights.read_bytes())
            for config in configs
            if (weights := config.with_name(WEIGHTS_FILE)).is_file()
        ]
        if not self._adapters:
            raise ValueError(f"{folder} has no adapter: name another --upload-folder.")

    def form(self, adapter_id: str | None = None) -> Form:
        """A random one of the adapters, as new content. adapter_id: None where the path has it."""
        config, weights = random.choice(self._adapters)
        boundary = uuid.uuid4().hex
        parts = [
            (f'name="files"; filename="{CONFIG_FILE}"', config),
            (f'name="files"; filename="{WEIGHTS_FILE}"', with_new_content(weights)),
        ]
        if adapter_id is not None:
            parts.insert(0, ('name="id"', adapter_id.encode()))
        pieces = [
            f"--{boundary}\r\nContent-Disposition: form-data; {names}\r\n\r\n".encode()
            + content
            + b"\r\n"
            for names, content in parts
        ]
        return Form(
            f"multipart/form-data; boundary={boundary}",
            b"".join(pieces) + f"--{boundary}--\r\n".encode(),
        )


def with_new_content(weights: bytes) -> bytes:
    """A safetensors file of the same tensors with a note in its header that no other has.

    So the bytes, by which versions are told apart, are new, and the weights stay ones that the
    server takes, whatever their kind and dtype.
    """
    (length,) = HEADER_LENGTH.unpack_from(weights)
    start = HEADER_LENGTH.size
    header = json.loads(weights[start : start + length])
    header["__metadata__"] = header.get("__metadata__", {}) | {"load_test": uuid.uuid4().hex}
    packed = json.dumps(header, separators=(",", ":")).encode()
    # The format has tensors begin at a multiple of eight bytes.
    packed += b" " * (-len(packed) % 8)
    return HEADER_LENGTH.pack(len(packed)) + packed + weights[start + length :]
