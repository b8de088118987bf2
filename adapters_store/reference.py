"""What an adapter is called, and which version of it is meant."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from polydelta.adapters_store.errors import InvalidAdapterError, UnknownAdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What comes from a client is joined to a path only when it looks like this: no separators, and no
# leading dot, so neither `..` nor a hidden folder.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

# (mtime in ns, size in bytes, inode) of the config and of the weights; None for a missing file.
Signature = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True)
class AdapterRef:
    """One version of one adapter, named but not read. Equal refs are the same version."""

    id: str
    version: int
    # Where its files are on this machine, or will be once they are fetched.
    path: Path = field(compare=False)
    # What the files looked like when the version was named; other files are not this version.
    signature: Signature | None = field(default=None, compare=False)
    # sha256 of the content, where it is known before the files are read. An id's number in a folder
    # and the same one in the catalog, which others may have given, are not the same version.
    digest: str | None = None

    @property
    def name(self) -> str:
        return f"{self.id}@{self.version}"


@dataclass(frozen=True)
class AdapterName:
    """`id`, which means the newest version, or `id@version`."""

    id: str
    version: int | None = None
    # What errors call the id, where that is not what is looked up.
    called: str | None = None

    def __str__(self) -> str:
        called = self.called or self.id
        return called if self.version is None else f"{called}@{self.version}"


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def check_id(text: str) -> str:
    """The id itself. Raises InvalidAdapterError."""
    if not is_id(text):
        raise InvalidAdapterError(
            f"id: {text[:200]!r} is no adapter id: use 1 to 128 letters, digits, dots, hyphens and "
            "underscores, a letter or digit first."
        )
    return text


def parse_name(text: str) -> AdapterName:
    """Raises UnknownAdapterError for what can be no adapter's name."""
    adapter_id, at, version = text.partition("@")
    if not is_id(adapter_id) or (at and not _VERSION.fullmatch(version)):
        raise unknown(text)
    return AdapterName(adapter_id, int(version) if at else None)


def unknown(name: str) -> UnknownAdapterError:
    """The same words whether a name is ill-formed or only not there."""
    return UnknownAdapterError(
        f"There is no adapter {name[:80]!r}: use `id` or `id@version`; "
        "GET /v1/models or `polydelta adapters list` shows the ids."
    )


def signature(path: Path) -> Signature:
    """Changes when a file of the adapter in this folder is rewritten or replaced."""
    return tuple(_file_signature(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE))


def _file_signature(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
