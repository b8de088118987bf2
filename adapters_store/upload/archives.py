"""Unpacks one archive, in one pass, into the two files that an adapter has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TypeVar

from polydelta.adapters_store.errors import AdapterError, InvalidAdapterError
from polydelta.adapters_store.reference import CONFIG_FILE
from polydelta.adapters_store.upload.contents import (
    HEAD_BYTES,
    Contents,
    archive_kind,
    split_name,
)
from polydelta.adapters_store.upload.limits import Quota, UploadLimits
from polydelta.adapters_store.upload.member import Member
from polydelta.adapters_store.upload.tar_members import Gunzip, tar_members
from polydelta.adapters_store.upload.zip_members import zip_members

T = TypeVar("T")


def unpack(name: str, archive: Path, contents: Contents, limits: UploadLimits) -> None:
    """Puts an archive's files where `contents` wants them.

    name: the client's, for messages. Raises InvalidAdapterError and TooLargeError.
    """
    with open(archive, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        quota = Quota(limits, archive_bytes=size)
        for member in _readable(name, _members(name, file, size, quota)):
            quota.begin(member.name)
            if member.chunks is None:
                split_name(f"{member.name}/{CONFIG_FILE}")
            else:
                _keep(member.name, _readable(name, member.chunks), contents, quota)


def _members(name: str, file: BinaryIO, size: int, quota: Quota) -> Iterator[Member]:
    kind = archive_kind(file.read(HEAD_BYTES))
    file.seek(0)
    if kind == "zip":
        return zip_members(file, size)
    if kind == "tar":
        return tar_members(file, quota)
    if kind == "gzip":
        return tar_members(Gunzip(file), quota)
    raise InvalidAdapterError(
        f"{name!r} is an archive of the kind {kind}, which is not unpacked: send a .zip or .tar.gz."
    )


def _keep(name: str, chunks: Iterator[bytes], contents: Contents, quota: Quota) -> None:
    first = next(chunks, b"")
    target = contents.admit(name, first[:HEAD_BYTES])
    with open(os.devnull if target is None else target, "wb") as file:
        for chunk in chain((first,), chunks):
            quota.add(len(chunk))
            file.write(chunk)


def _readable(name: str, items: Iterator[T]) -> Iterator[T]:
    """The items. Whatever a damaged archive makes a library raise, and that is a dozen types, is
    one error here; what goes wrong while they are written is not."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except AdapterError:
            raise
        except Exception as error:
            reason = str(error)[:300] or type(error).__name__
            raise InvalidAdapterError(
                f"{name!r} cannot be unpacked ({reason}): pack the adapter's files again, as a "
                ".zip or .tar.gz."
            ) from None
        yield item
