"""The form of an upload: files go to disk as they come, fields are few and small."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from polydelta.adapters_store.labels import check_labels
from polydelta.server.adapters.errors import adapter_errors
from polydelta.server.adapters.multipart import Part, Piece
from polydelta.server.errors import ApiError, shown

if TYPE_CHECKING:  # what checks an upload imports torch, which the routes do not need
    from polydelta.adapters_store.upload.staging import StagedUpload

MAX_FIELD_BYTES = 64 << 10
# Bytes of a file that are gathered before they go to another thread.
WRITE_BYTES = 1 << 20

# Calls a function on a thread where it may wait for the disk.
OnDisk = Callable[..., Awaitable[object]]

LABELS = TypeAdapter(dict[str, str])


class UploadForm:
    """Takes the pieces of a form: `id`, `labels` and `files`, in any order."""

    def __init__(
        self, upload: StagedUpload, on_disk: OnDisk, check_id: Callable[[str], str]
    ) -> None:
        """check_id: raises ApiError for an id that nothing can be uploaded as."""
        self.id: str | None = None
        # None when the form has none.
        self.labels: dict[str, str] | None = None
        self._upload = upload
        self._on_disk = on_disk
        self._check_id = check_id
        self._part: Part | None = None
        # Of the part at hand, not yet used or written.
        self._chunks: list[bytes] = []
        self._size = 0

    async def take(self, piece: Piece) -> None:
        """Raises ApiError, and what StagedUpload raises."""
        if isinstance(piece, Part):
            await self.end_part()
            await self._begin(piece)
            return
        self._chunks.append(piece)
        self._size += len(piece)
        if self._part is not None and self._part.field == "files":
            if self._size >= WRITE_BYTES:
                await self._write()
        elif self._size > MAX_FIELD_BYTES:
            field = self._part.field if self._part else ""
            raise ApiError(413, f"{field}: longer than {MAX_FIELD_BYTES} bytes.", field)

    async def end_part(self) -> None:
        """The part at hand is complete."""
        part, self._part = self._part, None
        if part is None:
            return
        if part.field == "files":
            await self._write()
            return
        content = b"".join(self._chunks)
        self._chunks, self._size = [], 0
        if part.field == "id":
            self.id = self._check_id(_decode(content))
        else:
            self.labels = parse_labels(content)

    async def _begin(self, part: Part) -> None:
        self._part = part
        if part.field == "files":
            if part.filename is None:
                raise ApiError(400, "files: each needs a file name.", "files")
            await self._on_disk(self._upload.open, part.filename)
            return
        if part.field not in ("id", "labels"):
            raise ApiError(
                400,
                f"{shown(part.field)}: this field is not supported; the form has `id`, `labels` "
                "and, once for each file, `files`.",
                part.field[:200],
            )
        if (self.id if part.field == "id" else self.labels) is not None:
            raise ApiError(400, f"{part.field}: this field is there twice.", part.field)

    async def _write(self) -> None:
        chunk = b"".join(self._chunks)
        self._chunks, self._size = [], 0
        await self._on_disk(self._upload.write, chunk)


def parse_labels(content: bytes) -> dict[str, str]:
    """Labels as a form has them, a JSON object. Raises ApiError."""
    try:
        labels = LABELS.validate_json(content, strict=True)
    except ValidationError:
        raise ApiError(
            400,
            'labels: write a JSON object of texts, such as {"team": "search"}, not '
            f"{shown(content.decode(errors='replace'))}.",
            "labels",
        ) from None
    with adapter_errors("labels"):
        return check_labels(labels)


def _decode(content: bytes) -> str:
    # What is no text is refused like any id with odd characters.
    return content.decode(errors="replace")
