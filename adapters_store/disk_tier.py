"""The disk tier: an adapter's files, read and checked once, and from then on its packed form."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.digest_notes import DigestNotes
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.load_times import LoadTier, LoadTimes
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packed_file import (
    UnreadableFileError,
    packed_digest,
    read_packed,
    write_packed,
)
from polydelta.adapters_store.packing import pack
from polydelta.adapters_store.reference import AdapterRef

logger = logging.getLogger(__name__)

# The folder is looked through when so large a part of its capacity was written: it may be exceeded
# by that much.
LOOKS = 64


class AdapterLoader(Protocol):
    """Where the host tier gets adapters from. Called on threads of its own, several at a time."""

    # Of all loads that succeeded.
    times: LoadTimes

    def load(self, ref: AdapterRef) -> PackedAdapter:
        """The adapter in memory, which nobody else writes to. Raises AdapterError."""
        ...


class FolderLoader:
    """Reads and packs an adapter each time, and keeps nothing."""

    def __init__(self, layout: BaseLayout, dtype: torch.dtype, bits: int | None = None) -> None:
        """bits: of low-rank matrices, 8 or 4; None: the dtype's."""
        self.times = LoadTimes()
        self._layout = layout
        self._dtype = dtype
        self._bits = bits

    def load(self, ref: AdapterRef) -> PackedAdapter:
        began = time.perf_counter()
        adapter = read_adapter(ref, self._layout)
        packed = pack(adapter, self._layout, self._dtype, self._bits)
        self.times.ended(LoadTier.FILES, began)
        return packed


class AdapterFiles(Protocol):
    """Where the files of uploaded adapters lie; see `content.py`."""

    def fetch(self, digest: str) -> Path:
        """The folder of a content on this machine. Raises StoreError."""
        ...


class DiskTier:
    """Loads adapters in packed form; one without it is read, checked, packed and written.

    Packed files are kept by digest, base model with its weights, dtype and bits. They are a cache,
    and least recently used ones are deleted beyond `capacity_bytes`.
    """

    def __init__(
        self,
        layout: BaseLayout,
        dtype: torch.dtype,
        folder: Path,
        files: AdapterFiles,
        capacity_bytes: int,
        bits: int | None = None,
    ) -> None:
        """bits: as FolderLoader has them."""
        self.times = LoadTimes()
        self._loader = FolderLoader(layout, dtype, bits)
        # Of some formats the packed numbers were computed from the base's weights.
        told = f"{layout.fingerprint}\n{layout.weights_id}"
        base = hashlib.sha256(told.encode()).hexdigest()[:16]
        numbers = str(dtype).removeprefix("torch.") + ("" if bits is None else f"-{bits}bit")
        self._file_name = f"{base}-{numbers}.packed"
        self._folder = folder
        self._files = files
        self._capacity_bytes = capacity_bytes
        # Written since the folder was last looked through; None before the first time. Others write
        # into it too, so what it holds is not counted here.
        self._unseen_bytes: int | None = None
        # Digests of versions whose files lie in a folder of the operator's, known once they were
        # read: a version can be loaded again after its files have changed.
        self._digests: dict[AdapterRef, str] = {}
        self._notes = DigestNotes(folder / "notes")

    def load(self, ref: AdapterRef) -> PackedAdapter:
        began = time.perf_counter()
        digest = ref.digest or self._digests.get(ref) or self._notes.find(ref)
        if digest is not None and (packed := self._read(digest)) is not None:
            self._know(ref, digest)
            self.times.ended(LoadTier.PACKED, began)
            return packed
        if ref.digest is not None:
            self._files.fetch(ref.digest)
        packed = self.prepare(ref)
        self._know(ref, packed.digest)
        self.times.ended(LoadTier.FILES, began)
        return packed

    def prepare(self, ref: AdapterRef) -> PackedAdapter:
        """Reads, checks and packs the files at `ref.path`. Raises AdapterError."""
        return self._write(self._loader.load(ref))

    def holds(self, digest: str) -> bool:
        """Whether a content was checked and packed before; its layers are not read for that."""
        try:
            return packed_digest(self._path(digest)) == digest
        except UnreadableFileError:
            return False

    def _know(self, ref: AdapterRef, digest: str) -> None:
        """Takes note of the content of an operator's folder."""
        if ref.digest is not None or ref in self._digests:
            return
        self._digests[ref] = digest
        # That it could not be written costs the next process a look at the files, nothing else.
        with contextlib.suppress(OSError):
            self._notes.write(ref, digest)

    def _path(self, digest: str) -> Path:
        return self._folder / digest / self._file_name

    def _read(self, digest: str) -> PackedAdapter | None:
        path = self._path(digest)
        try:
            packed = read_packed(path)
            # The order in which packed files are deleted.
            os.utime(path)
        except (UnreadableFileError, OSError):
            return None
        return packed if packed.digest == digest else None

    def _write(self, packed: PackedAdapter) -> PackedAdapter:
        """The adapter itself; that it could not be written is no reason not to serve it."""
        try:
            write_packed(packed, self._path(packed.digest))
            self._trim(packed.nbytes)
        except OSError as error:
            logger.warning("a packed adapter could not be kept on disk: %s", error)
        return packed

    def _trim(self, written: int) -> None:
        """Now and then: to look at 2,000 files takes 35 ms, to write one 5."""
        if self._unseen_bytes is not None:
            self._unseen_bytes += written
            if self._unseen_bytes < self._capacity_bytes // LOOKS:
                return
        self._unseen_bytes = 0
        files = sorted(self._stats())
        excess = sum(size for _, size, _ in files) - self._capacity_bytes
        # Never the newest one: it was just written.
        for _, size, path in files[:-1]:
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()
            excess -= size
        self._notes.sweep(lambda digest: (self._folder / digest).is_dir())

    def _stats(self) -> Iterator[tuple[float, int, Path]]:
        """When it was last used, bytes, path, of each packed file."""
        for path in self._folder.glob("*/*.packed"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                yield stat.st_mtime, stat.st_size, path
