"""A zip archive: plain files and folders, stored or deflated."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from polydelta.adapters_store.formats.files import CHUNK_BYTES
from polydelta.adapters_store.upload.member import Member

_ENCRYPTED = 0x1


class _BoundedReads:
    """Stands between a file and `ZipFile`, which reads a directory of any declared size at once."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def read(self, nbytes: int = -1) -> bytes:
        if nbytes < 0:
            nbytes = max(self._size - self._file.tell(), 0)
        # Data is read in pieces of CHUNK_BYTES. A directory of this size lists 20,000 files.
        if nbytes > CHUNK_BYTES:
            raise ValueError(f"its directory claims {nbytes} bytes")
        return self._file.read(nbytes)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def zip_members(file: BinaryIO, size: int) -> Iterator[Member]:
    """The members in the directory's order.

    size: of the file, in bytes. Raises ValueError, and whatever `zipfile` raises, for what is no
    such archive.
    """
    with ZipFile(_BoundedReads(file, size)) as archive:
        for info in archive.infolist():
            # The other name is cut off at a NUL.
            name = info.orig_filename
            _check(name, info)
            if name.endswith("/"):
                yield Member(name.rstrip("/"), None)
            else:
                yield Member(name, _chunks(archive, info))


def _check(name: str, info: ZipInfo) -> None:
    # The upper half is the mode of Unix; nothing but zeros when written elsewhere.
    kind = stat.S_IFMT(info.external_attr >> 16)
    allowed = stat.S_IFDIR if name.endswith("/") else stat.S_IFREG
    if kind not in (0, allowed):
        raise ValueError(f"{name[:200]!r} is a link, or no plain file")
    if name.endswith("/") and info.file_size:
        raise ValueError(f"{name[:200]!r} is a folder with content")
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(f"{name[:200]!r} is encrypted")
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise ValueError(f"{name[:200]!r} is neither stored nor deflated")


def _chunks(archive: ZipFile, info: ZipInfo) -> Iterator[bytes]:
    done = 0
    with archive.open(info) as file:
        while chunk := file.read(CHUNK_BYTES):
            done += len(chunk)
            yield chunk
    if done != info.file_size:
        raise ValueError(f"{info.orig_filename[:200]!r} has {done} bytes, not {info.file_size}")
