"""Where uploads come to lie before they are an adapter: one folder each, gone when it ends.

Nothing in these folders is part of the store. An upload gets there by a rename of its finished
folder, so a process that is killed at any moment leaves at most a folder to sweep.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from polydelta.adapters_store.content import sync
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import (
    folder_digest,
    read_chunks,
    read_config_bytes,
    read_shapes,
)
from polydelta.adapters_store.formats.peft_config import parse_config
from polydelta.adapters_store.upload.archives import unpack
from polydelta.adapters_store.upload.contents import (
    HEAD_BYTES,
    KEPT,
    Contents,
    archive_kind,
    split_name,
)
from polydelta.adapters_store.upload.limits import Quota, UploadLimits


@dataclass(frozen=True)
class StagedAdapter:
    """An upload that has been taken apart: sound files, on disk, of an adapter of some base."""

    # Holds exactly the config and the weights; may be renamed away.
    folder: Path
    # As in `Adapter.digest`.
    digest: str
    # Of the two files.
    nbytes: int
    # Files that came with them and are not kept, by the client's names.
    ignored: tuple[str, ...]


class Staging:
    """Makes folders for uploads under one root, which is nobody else's. Threads may share it."""

    def __init__(self, root: Path, limits: UploadLimits) -> None:
        self._root = root
        self._limits = limits

    def begin(self) -> StagedUpload:
        """A new upload. Whoever begins it uses it as a context manager. Raises OSError."""
        self._root.mkdir(parents=True, exist_ok=True)
        return StagedUpload(Path(tempfile.mkdtemp(dir=self._root)), self._limits)


class StagedUpload:
    """One upload: files come one after the other, then it is finished. For one thread at a time.

    `open`, `write` and `take` raise InvalidAdapterError, and TooLargeError beyond the limits.
    """

    def __init__(self, folder: Path, limits: UploadLimits) -> None:
        self._folder = folder
        self._limits = limits
        self._quota = Quota(limits)
        # The client's name and where it lies, under a number; in the order of arrival.
        self._files: list[tuple[str, Path]] = []
        self._open: BinaryIO | None = None
        self._ignored: tuple[str, ...] = ()

    def __enter__(self) -> StagedUpload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        # What cannot be removed now is swept at the next start.
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, filename: str) -> None:
        """The next file begins. filename: the client's."""
        self.close()
        split_name(filename)
        self._quota.begin(filename)
        path = self._folder / str(len(self._files))
        self._open = open(path, "wb")  # noqa: SIM115
        self._files.append((filename, path))

    def write(self, chunk: bytes) -> None:
        """More of the file that was opened last."""
        if self._open is None:
            raise RuntimeError("No file of the upload is open.")
        self._quota.add(len(chunk))
        self._open.write(chunk)

    def close(self) -> None:
        """The file is complete."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def take(self, folder: Path, roots: Sequence[Path]) -> None:
        """Copies an adapter's two files from a folder of this machine. Other files in it are
        ignored without being opened.

        roots: links are followed to files below one of these, as the hub's cache has them.
        """
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise InvalidAdapterError(_unreadable("The adapter's folder", error)) from None
        try:
            present = os.listdir(handle)
            for name in KEPT:
                if name in present:
                    self._copy(name, folder, handle, roots)
        finally:
            os.close(handle)
        # A name on disk may be no text.
        others = (os.fsencode(name).decode(errors="replace") for name in present)
        self._ignored += tuple(sorted(name for name in others if name not in KEPT))

    def finish(self) -> StagedAdapter:
        """Unpacks the upload if it is an archive, and checks all that needs no base model.

        Raises InvalidAdapterError and TooLargeError.
        """
        self.close()
        adapter = self._folder / "adapter"
        adapter.mkdir()
        contents = Contents(adapter)
        heads = [_head(path) for _, path in self._files]
        if len(self._files) == 1 and archive_kind(heads[0]) is not None:
            unpack(*self._files[0], contents, self._limits)
        else:
            for (name, path), head in zip(self._files, heads, strict=True):
                if (target := contents.admit(name, head)) is not None:
                    path.rename(target)
        contents.check_complete()
        parse_config(read_config_bytes(adapter))
        read_shapes(adapter)
        for path in (*(adapter / name for name in KEPT), adapter):
            sync(path)
        return StagedAdapter(
            folder=adapter,
            digest=folder_digest(adapter),
            nbytes=sum((adapter / name).stat().st_size for name in KEPT),
            ignored=(*contents.ignored, *self._ignored),
        )

    def _copy(self, name: str, folder: Path, handle: int, roots: Sequence[Path]) -> None:
        path = Path(name)
        if (folder / name).is_symlink():
            path = Path(os.path.realpath(folder / name))
            if not any(path.is_relative_to(root) for root in roots):
                raise _not_plain(name)

        def open_plain(path: str, flags: int) -> int:
            # A link that was put there a moment ago could lead anywhere; and opening a pipe would
            # wait for its writer.
            return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)

        try:
            source = open(path, "rb", opener=open_plain)  # noqa: SIM115
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _not_plain(name) from None
            raise InvalidAdapterError(_unreadable(name, error)) from None
        with source:
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                raise _not_plain(name)
            self.open(name)
            for chunk in read_chunks(source):
                self.write(chunk)
            self.close()


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def _unreadable(what: str, error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"{what} cannot be read ({reason}): check that it is there and readable."


def _not_plain(name: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"{name} is no plain file, or a link to where clients may name none: copy the file itself "
        "into the folder."
    )
