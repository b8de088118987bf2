"""What the files in operators' folders were when they were last read; it outlives the process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from polydelta.adapters_store.reference import AdapterRef

_DIGEST = re.compile(r"[0-9a-f]{64}")


class DigestNotes:
    """A small file for each folder as it looked: its name tells path and signature, its text the
    digest of the content. A note that is lost, damaged or out of date is none at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, ref: AdapterRef) -> str | None:
        try:
            digest = self._path(ref).read_text()
        except (OSError, UnicodeDecodeError):
            return None
        return digest if _DIGEST.fullmatch(digest) else None

    def write(self, ref: AdapterRef, digest: str) -> None:
        """Raises OSError. What has no signature has no note."""
        if ref.signature is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(ref)
        # Processes that write the same note at once write the same text.
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(path)

    def sweep(self, is_kept: Callable[[str], bool]) -> None:
        """Deletes notes of contents that are not kept any more, and what a crash left."""
        with contextlib.suppress(OSError):
            for path in list(self._folder.iterdir()):
                with contextlib.suppress(OSError):
                    if path.suffix or not is_kept(path.read_text(errors="replace")):
                        path.unlink()

    def _path(self, ref: AdapterRef) -> Path:
        looks = f"{ref.path.absolute()}\n{ref.signature}"
        return self._folder / hashlib.sha256(looks.encode(errors="surrogateescape")).hexdigest()
