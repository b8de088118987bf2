"""Contents that come and go with the catalog's rows, so that a crash between the two is settled.

A content is noted before it is added, or before its last row is removed. Whoever finds a note later
asks the catalog: what no version has goes, and the note with it. What was never noted is not
touched, whatever the catalog says: an operator may have named the wrong one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from polydelta.adapters_store.catalog import Catalog
from polydelta.adapters_store.content import ContentStore
from polydelta.adapters_store.errors import StoreError
from polydelta.adapters_store.file_lock import Turn

_DIGEST = re.compile(r"[0-9a-f]{64}")


class PendingContents:
    """One change at a time, in all processes that share the folder."""

    def __init__(
        self, folder: Path, catalog: Catalog, content: ContentStore, packed_folder: Path
    ) -> None:
        """folder: of the notes, one empty file for each. Raises OSError."""
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._catalog = catalog
        self._content = content
        self._packed_folder = packed_folder
        self._turn = Turn(folder / "lock")

    @contextmanager
    def changing(self, digests: Collection[str]) -> Iterator[None]:
        """Rows and contents of these digests may be added and removed; however it ends, a content
        stays if a version has it. Raises StoreError."""
        with self._turn.taken():
            for digest in digests:
                self._note(digest)
            try:
                yield
            finally:
                for digest in digests:
                    self._settle(digest)

    def settle_all(self) -> None:
        """What others were at when they ended. Raises StoreError."""
        with self._turn.taken():
            for note in list(self._folder.iterdir()):
                if _DIGEST.fullmatch(note.name):
                    self._settle(note.name)

    def _note(self, digest: str) -> None:
        try:
            (self._folder / digest).touch()
        except OSError as error:
            raise StoreError(f"The store's disk cannot be written ({error.strerror}).") from None

    def _settle(self, digest: str) -> None:
        if not self._catalog.has_digest(digest):
            self._content.remove(digest)
            shutil.rmtree(self._packed_folder / digest, ignore_errors=True)
        (self._folder / digest).unlink(missing_ok=True)
