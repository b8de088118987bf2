"""A tar archive, read forwards once: plain files and folders of the ustar format (POSIX.1-1988)
with the long names of GNU and of pax (POSIX.1-2001).

Python's own reader is not used. It seeks over members without counting what gzip unpacks on the
way, reads extension headers of any size into memory, and searches them in quadratic time.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO, Protocol

from polydelta.adapters_store.formats.files import CHUNK_BYTES
from polydelta.adapters_store.upload.limits import Quota
from polydelta.adapters_store.upload.member import Member

_BLOCK = 512
# Headers that hold a long name or attributes of the next member.
_MAX_EXTENSION_BYTES = 64 << 10
_MAX_EXTENSIONS = 4
_EXTENSIONS = (_GNU_NAME, _PAX, _PAX_GLOBAL) = (b"L", b"x", b"g")
_FILES = (b"0", b"\0")
_FOLDER = b"5"
_REFUSED: Mapping[bytes, str] = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"K": "a link",
    b"S": "a sparse file",
}
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,5}) ")


class Stream(Protocol):
    """A file that is only read forwards."""

    def read(self, nbytes: int, /) -> bytes:
        """That many bytes; fewer only at the end."""
        ...


class Gunzip:
    """The content of a gzip file (RFC 1952), unpacked no further than it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def read(self, nbytes: int, /) -> bytes:
        """Raises zlib.error and ValueError for a damaged file."""
        parts: list[bytes] = []
        while nbytes and not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._file.read(CHUNK_BYTES >> 4)
            data = self._inflate.decompress(packed, nbytes)
            if not packed and not data and not self._inflate.eof:
                raise ValueError("it ends early")
            parts.append(data)
            nbytes -= len(data)
        if self._inflate.eof and (self._inflate.unused_data or self._file.read(1)):
            raise ValueError("something follows its end")
        return b"".join(parts)


def tar_members(stream: Stream, quota: Quota) -> Iterator[Member]:
    """The members in their order. Each one's chunks must be used up before the next one.

    quota: counts what is between the files. Raises ValueError for what is no such archive.
    """
    name: str | None = None
    extensions = 0
    while True:
        header = _read(stream, _BLOCK, quota)
        if not header.strip(b"\0"):
            break
        kind, size = _kind_and_size(header)
        if kind in _EXTENSIONS:
            extensions += 1
            if size > _MAX_EXTENSION_BYTES or extensions > _MAX_EXTENSIONS:
                raise ValueError("its headers are too large")
            content = _read(stream, _padded(size), quota)[:size]
            name = _long_name(kind, content) or name
            continue
        name = _name(header) if name is None else name
        if kind in _REFUSED or kind not in (*_FILES, _FOLDER):
            raise ValueError(f"{name[:200]!r} is {_REFUSED.get(kind, 'no plain file')}")
        if kind == _FOLDER or name.endswith("/"):
            if size:
                raise ValueError(f"{name[:200]!r} is a folder with content")
            yield Member(name.rstrip("/"), None)
        else:
            yield Member(name, _chunks(stream, size))
            _read(stream, _padded(size) - size, quota)
        name, extensions = None, 0
    # Reads what is left, so that the checksum at the end of a gzip file is looked at.
    while rest := stream.read(CHUNK_BYTES):
        quota.add_overhead(len(rest))
        if rest.strip(b"\0"):
            raise ValueError("something follows its end")


def _chunks(stream: Stream, size: int) -> Iterator[bytes]:
    while size:
        chunk = stream.read(min(size, CHUNK_BYTES))
        if not chunk:
            raise ValueError("it ends early")
        size -= len(chunk)
        yield chunk


def _read(stream: Stream, nbytes: int, quota: Quota) -> bytes:
    quota.add_overhead(nbytes)
    content = stream.read(nbytes)
    if len(content) < nbytes:
        raise ValueError("it ends early")
    return content


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _kind_and_size(header: bytes) -> tuple[bytes, int]:
    checksum = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    if _octal(header[148:156]) != checksum:
        raise ValueError("a header's checksum is wrong")
    if not header.startswith(b"ustar", 257):
        raise ValueError("a header is not of the ustar format")
    return header[156:157], _octal(header[124:136])


def _octal(field: bytes) -> int:
    # Numbers of 8 GiB and more are written in another way, and are too large in any case.
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise ValueError(f"a header has {field!r} for a number")
    return int(match[1], 8)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # GNU has times where POSIX has the beginning of a long name.
    prefix = _text(header[345:500]) if header.startswith(b"ustar\0", 257) else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode()


def _long_name(kind: bytes, content: bytes) -> str | None:
    if kind == _GNU_NAME:
        return content.removesuffix(b"\0").decode()
    records = dict(_pax_records(content))
    for key in records:
        if key == b"size" or key.startswith(b"GNU.sparse") or (kind, key) == (_PAX_GLOBAL, b"path"):
            raise ValueError(f"a header sets {key!r}")
    return records[b"path"].decode() if b"path" in records else None


def _pax_records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """`<length> <key>=<value>\\n`, where the length is that of the whole record."""
    position = 0
    while position < len(content):
        length = _PAX_LENGTH.match(content, position)
        end = position + int(length[1]) if length else position
        if length is None or not length.end() < end <= len(content):
            raise ValueError("a pax header is damaged")
        key, _, value = content[length.end() : end - 1].partition(b"=")
        yield key, value
        position = end
