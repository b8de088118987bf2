"""Which adapters there are: folders under one or more roots, looked up by name when asked for.

Nothing is read at start, so ten thousand folders cost nothing until one of them is named.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polydelta.adapters_store.errors import UnknownAdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What comes from a client is joined to a path only when it looks like this: no separators, and no
# leading dot, so neither `..` nor a hidden folder.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

# (mtime in ns, size in bytes, inode) of the config and of the weights; None for a missing file.
Signature = tuple[tuple[int, int, int] | None, ...]


def signature(path: Path) -> Signature:
    """Changes when a file of the adapter in this folder is rewritten or replaced."""
    return tuple(_file_signature(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE))


def _file_signature(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@dataclass(frozen=True)
class AdapterRef:
    """One version of one adapter, named but not read. Equal refs are the same version."""

    id: str
    version: int
    path: Path = field(compare=False)
    # What the files looked like when the version was named; other files are not this version.
    signature: Signature | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return f"{self.id}@{self.version}"


class AdapterCatalog:
    """Looks adapters up by name. Threads may share it.

    Versions count from 1 within this process: files that differ from those last seen under the
    same id are the next version.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        """roots: folders whose subfolders are adapters; of the same id, the first root's counts.

        Raises ValueError for a root that is no folder.
        """
        for root in roots:
            if not root.is_dir():
                raise ValueError(
                    f"adapters folder {str(root)!r} is not there: create it, or name another one."
                )
        self._roots = tuple(roots)
        # The newest version of each adapter that was asked for.
        self._seen: dict[str, AdapterRef] = {}
        self._lock = threading.Lock()

    def resolve(self, name: str) -> AdapterRef:
        """The adapter that `id` or `id@version` names; without a version, the newest.

        Raises UnknownAdapterError.
        """
        adapter_id, at, version = name.partition("@")
        ref = self._find(adapter_id) if _ID.fullmatch(adapter_id) else None
        if ref is None or (at and not _VERSION.fullmatch(version)):
            raise UnknownAdapterError(
                f"There is no adapter {name[:200]!r}: use `id` or `id@version`; "
                "GET /v1/models or `polydelta adapters list` shows the ids."
            )
        if at and int(version) != ref.version:
            raise UnknownAdapterError(
                f"Adapter {ref.id!r} has no version {version} any more or yet: "
                f"the current one is {ref.name!r}."
            )
        return ref

    def list(self) -> Iterator[AdapterRef]:
        """Every adapter, by id. Folders are looked into one by one, as they are asked for."""
        ids: set[str] = set()
        for root in self._roots:
            with os.scandir(root) as entries:
                ids.update(entry.name for entry in entries if _ID.fullmatch(entry.name))
        for adapter_id in sorted(ids):
            ref = self._find(adapter_id)
            if ref is not None:
                yield ref

    def _find(self, adapter_id: str) -> AdapterRef | None:
        # The files are looked at under the lock: otherwise a slow thread could hand in an old look
        # at them as if it were a newer version.
        with self._lock:
            for root in self._roots:
                path = root / adapter_id
                found = signature(path)
                if found[0] is not None:
                    return self._version(adapter_id, path, found)
        return None

    def _version(self, adapter_id: str, path: Path, found: Signature) -> AdapterRef:
        seen = self._seen.get(adapter_id)
        if seen is None or seen.path != path or seen.signature != found:
            version = 1 if seen is None else seen.version + 1
            seen = AdapterRef(adapter_id, version, path, found)
            self._seen[adapter_id] = seen
        return seen
