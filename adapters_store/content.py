"""Adapters' files by the sha256 of their content: written once, never changed.

Identical uploads are one content, whatever they are called.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Protocol

import fsspec

from polydelta.adapters_store.errors import InvalidAdapterError, StoreError
from polydelta.adapters_store.formats.files import folder_digest
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

FILES = (WEIGHTS_FILE, CONFIG_FILE)


class ContentStore(Protocol):
    """Where the files of versions lie. Threads may share it."""

    def path(self, digest: str) -> Path:
        """The content's folder on this machine, whether it is there yet or not."""
        ...

    def add(self, digest: str, staged: Path) -> None:
        """Takes over the files of a folder whose content has this digest. Raises StoreError."""
        ...

    def fetch(self, digest: str) -> Path:
        """The content's folder, with the files in it. Raises StoreError."""
        ...

    def remove(self, digest: str) -> None:
        """Raises StoreError."""
        ...


class LocalContent:
    """Contents as subfolders of one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self._root / digest

    def add(self, digest: str, staged: Path) -> None:
        folder = self.path(digest)
        try:
            # Files that are whole stay what they are: somebody may be reading them.
            if not _moved(staged, folder) and not _is_whole(folder, digest):
                # File by file, so that none is missing at any time.
                for name in FILES:
                    os.replace(staged / name, folder / name)
            sync(folder)
            sync(self._root)
        except OSError as error:
            raise _failed("written", error) from None

    def fetch(self, digest: str) -> Path:
        if not self.holds(digest):
            raise StoreError(
                f"The files of content {digest[:12]} are gone from the store: upload it again."
            )
        return self.path(digest)

    def remove(self, digest: str) -> None:
        gone = self._root / f".gone-{uuid.uuid4().hex}"
        try:
            # A rename first: a folder under its digest is always whole.
            os.rename(self.path(digest), gone)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _failed("removed", error) from None
        shutil.rmtree(gone, ignore_errors=True)

    def holds(self, digest: str) -> bool:
        folder = self.path(digest)
        return all((folder / name).is_file() for name in FILES)

    def sweep(self) -> None:
        """Removes what a crash has left of removals and of fetches. Not while others go on."""
        for folder in self._root.glob(".*"):
            shutil.rmtree(folder, ignore_errors=True)


class RemoteContent:
    """Contents in an object store, read through to this machine's disk.

    Any URL that fsspec knows: `s3://bucket/prefix`, `gs://bucket/prefix`, ...
    """

    def __init__(self, url: str, cache: LocalContent) -> None:
        """Raises StoreError when there is no driver for the URL."""
        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"storage {url!r} cannot be used ({error}): install the extra that has its driver, "
                "such as polydelta[s3]."
            ) from None
        self._files: Any = filesystem
        self._origin = root.rstrip("/")
        self._cache = cache

    def path(self, digest: str) -> Path:
        return self._cache.path(digest)

    def add(self, digest: str, staged: Path) -> None:
        try:
            self._files.makedirs(self._remote(digest), exist_ok=True)
            for name in FILES:
                self._files.put_file(str(staged / name), self._remote(digest, name))
        except Exception as error:  # each driver raises its own
            raise _failed("sent to the storage", error) from error
        self._cache.add(digest, staged)

    def fetch(self, digest: str) -> Path:
        if self._cache.holds(digest):
            return self._cache.fetch(digest)
        # Beside its place, so that it gets there by a rename; swept when it stays behind.
        part = self._cache.path(f".part-{uuid.uuid4().hex}")
        try:
            part.mkdir()
            for name in FILES:
                self._files.get_file(self._remote(digest, name), str(part / name))
            if folder_digest(part) != digest:
                raise StoreError(
                    f"The storage's files of content {digest[:12]} are not those that were "
                    "uploaded: upload it again."
                )
            self._cache.add(digest, part)
        except StoreError:
            raise
        except Exception as error:  # each driver raises its own
            raise _failed("fetched from the storage", error) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return self._cache.fetch(digest)

    def remove(self, digest: str) -> None:
        self._cache.remove(digest)
        try:
            self._files.rm(self._remote(digest), recursive=True)
        except FileNotFoundError:
            return
        except Exception as error:  # each driver raises its own
            raise _failed("removed from the storage", error) from error

    def _remote(self, digest: str, *name: str) -> str:
        return "/".join((self._origin, digest, *name))


def _moved(folder: Path, place: Path) -> bool:
    """Whether a folder could be renamed: not to a place where one lies already. It is tried and
    not looked up, because another thread may fetch the same content."""
    try:
        os.rename(folder, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        return folder_digest(folder) == digest
    except InvalidAdapterError:
        return False


def sync(path: Path) -> None:
    """Makes what was written to a file, or the renames in a folder, last through a crash of the
    machine. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failed(what: str, error: Exception) -> StoreError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return StoreError(f"The adapter's files could not be {what} ({reason}); see the server's log.")
