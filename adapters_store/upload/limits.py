"""How much one upload may bring, and the count of what it has brought."""

from __future__ import annotations

from dataclasses import dataclass

from polydelta.adapters_store.errors import InvalidAdapterError, TooLargeError


@dataclass(frozen=True)
class UploadLimits:
    """Bytes are counted as they come; what a client or an archive declares is not believed."""

    # Of one file, whether sent by itself or in an archive.
    max_file_bytes: int = 2 << 30
    # Of all files that are sent, and again of all that an archive holds.
    max_total_bytes: int = 4 << 30
    # Folders in an archive count too.
    max_files: int = 64
    # Bytes that one byte of an archive may unpack to. Weights shrink little: 1.1 is typical.
    max_ratio: int = 200
    # An archive may always unpack to this much: small texts can be squeezed harder.
    ratio_free_bytes: int = 8 << 20
    max_rank: int = 1024


class Quota:
    """Counts files and bytes of one upload, or of what one archive unpacks to."""

    def __init__(self, limits: UploadLimits, archive_bytes: int | None = None) -> None:
        """archive_bytes: size of the archive whose content is counted; None for what is sent."""
        self._limits = limits
        self._files = 0
        self._name = ""
        self._file_bytes = 0
        self._total_bytes = 0
        self._unpacked_limit = (
            None
            if archive_bytes is None
            else max(limits.ratio_free_bytes, archive_bytes * limits.max_ratio)
        )

    def begin(self, name: str) -> None:
        """A file begins. Raises TooLargeError."""
        self._files += 1
        if self._files > self._limits.max_files:
            raise TooLargeError(
                f"The upload has more than {self._limits.max_files} files: send the adapter's two "
                "files alone."
            )
        self._name, self._file_bytes = name, 0

    def add(self, nbytes: int) -> None:
        """Bytes of the file came. Raises TooLargeError, and InvalidAdapterError for a bomb."""
        self._file_bytes += nbytes
        if self._file_bytes > self._limits.max_file_bytes:
            raise TooLargeError(
                f"{self._name!r} is larger than {self._limits.max_file_bytes} bytes: this server "
                "takes no larger files."
            )
        self.add_overhead(nbytes)

    def add_overhead(self, nbytes: int) -> None:
        """Bytes that belong to no file came. Raises as `add` does."""
        self._total_bytes += nbytes
        if self._total_bytes > self._limits.max_total_bytes:
            raise TooLargeError(
                f"The upload is larger than {self._limits.max_total_bytes} bytes in all: this "
                "server takes no larger ones."
            )
        if self._unpacked_limit is not None and self._total_bytes > self._unpacked_limit:
            raise InvalidAdapterError(
                f"The archive unpacks to more than {self._limits.max_ratio} times its size, as "
                "weights never do: send the adapter's two files themselves."
            )
