"""What the files in operators' folders were when they were last read; it outlives the process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from polydelta.adapters_store.reference import AdapterRef

# Of so many folders at most: those that were loaded last.
MAX_NOTES = 100_000

_NOTE = re.compile(r"([0-9a-f]{64})\n(.+)\n")


class DigestNotes:
    """A small file for each folder, named by its path: the digest of the content, and what the
    files looked like then. One that is lost, damaged or out of date is none at all."""

    def __init__(self, folder: Path, max_notes: int = MAX_NOTES) -> None:
        self._folder = folder
        self._max_notes = max_notes

    def find(self, ref: AdapterRef) -> str | None:
        try:
            note = _NOTE.fullmatch(self._path(ref).read_text())
        except (OSError, UnicodeDecodeError):
            return None
        return note[1] if note is not None and note[2] == str(ref.signature) else None

    def write(self, ref: AdapterRef, digest: str) -> None:
        """In place of what was noted of the same folder. Raises OSError. What has no signature has
        no note."""
        if ref.signature is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(f"{digest}\n{ref.signature}\n")
            os.replace(name, self._path(ref))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def sweep(self, is_kept: Callable[[str], bool]) -> None:
        """Deletes notes of contents that are not kept any more, the oldest of too many, and what a
        crash left."""
        kept = sorted(self._swept(is_kept), reverse=True)
        for _, path in kept[self._max_notes :]:
            with contextlib.suppress(OSError):
                path.unlink()

    def _swept(self, is_kept: Callable[[str], bool]) -> Iterator[tuple[float, Path]]:
        """When it was written, and path, of each note that is left."""
        with contextlib.suppress(OSError):
            for path in list(self._folder.iterdir()):
                with contextlib.suppress(OSError):
                    note = _NOTE.fullmatch(path.read_text(errors="replace"))
                    if note is None or path.suffix or not is_kept(note[1]):
                        path.unlink()
                    else:
                        yield path.stat().st_mtime, path

    def _path(self, ref: AdapterRef) -> Path:
        path = os.fsencode(ref.path.absolute())
        return self._folder / hashlib.sha256(path).hexdigest()
