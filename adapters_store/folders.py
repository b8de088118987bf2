"""Adapters in folders of the operator's, served where they lie: one adapter in each subfolder.

Nothing is read at start, so ten thousand folders cost nothing until one of them is named.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from polydelta.adapters_store.errors import UnknownAdapterError
from polydelta.adapters_store.reference import (
    AdapterName,
    AdapterRef,
    Signature,
    is_id,
    parse_name,
    signature,
    unknown,
)


class FolderCatalog:
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

    def resolve(self, name: str | AdapterName) -> AdapterRef:
        """The adapter that `id` or `id@version` names; without a version, the newest.

        Raises UnknownAdapterError.
        """
        wanted = parse_name(name) if isinstance(name, str) else name
        ref = self.find(wanted.id)
        if ref is None:
            raise unknown(str(wanted))
        if wanted.version not in (None, ref.version):
            raise UnknownAdapterError(
                f"Adapter {ref.id!r} has no version {wanted.version} any more or yet: "
                f"the current one is {ref.name!r}."
            )
        return ref

    def ids(self) -> list[str]:
        """Names of the subfolders that could be adapters, in order; none is looked into."""
        names: set[str] = set()
        for root in self._roots:
            with os.scandir(root) as entries:
                names.update(entry.name for entry in entries if is_id(entry.name))
        return sorted(names)

    def list(self) -> Iterator[AdapterRef]:
        """Every adapter, by id. Folders are looked into one by one, as they are asked for."""
        for adapter_id in self.ids():
            ref = self.find(adapter_id)
            if ref is not None:
                yield ref

    def find(self, adapter_id: str) -> AdapterRef | None:
        """The newest version, if a folder of this name has an adapter; the id must be one."""
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
