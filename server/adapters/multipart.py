"""A multipart body as a stream of parts: nothing of it is kept, and whatever is wrong is a 400.

Bodies are as RFC 7578 has them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from polydelta.server.body_limits import IDLE_SECONDS, read_chunks
from polydelta.server.errors import ApiError, shown

MAX_PARTS = 128
# Of one part, names and values together.
MAX_HEADER_BYTES = 8 << 10
# As RFC 2046 has it.
MAX_BOUNDARY_BYTES = 70

# Encodings of a part that change none of its bytes.
_PLAIN = frozenset({b"", b"7bit", b"8bit", b"binary"})


@dataclass(frozen=True)
class Part:
    """Where a part begins; its bytes follow."""

    field: str
    # The client's name of a file; None for a plain field.
    filename: str | None


# A part, or more bytes of the part that began last.
Piece = Part | bytes


async def read_parts(
    request: Request, idle_seconds: float = IDLE_SECONDS
) -> AsyncGenerator[Piece, None]:
    """The parts of a request's body up to its last boundary. Raises ApiError."""
    parser = PartParser(_boundary(request.headers.get("content-type", "")))
    async with aclosing(read_chunks(request, idle_seconds)) as chunks:
        async for chunk in chunks:
            for piece in parser.feed(chunk):
                yield piece
            if parser.ended:
                return
    raise ApiError(400, "The body ends before its last boundary: send all of it.")


class PartParser:
    """Cuts bytes, however they come, into pieces."""

    def __init__(self, boundary: bytes) -> None:
        self.ended = False
        self._pieces: list[Piece] = []
        self._parts = 0
        self._headers: list[tuple[bytearray, bytearray]] = []
        self._header_bytes = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_begin": lambda: self._headers.append((bytearray(), bytearray())),
                "on_header_field": lambda data, start, end: self._header(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._header(1, data[start:end]),
                "on_headers_finished": self._begin_part,
                "on_part_data": lambda data, start, end: self._pieces.append(data[start:end]),
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> list[Piece]:
        """What begins or goes on in the next bytes of the body. Raises ApiError."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise ApiError(400, f"The body is not a multipart form: {str(error)[:200]}.") from None
        pieces, self._pieces = self._pieces, []
        return pieces

    def _header(self, half: int, data: bytes) -> None:
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ApiError(
                400, f"The headers of a part have more than {MAX_HEADER_BYTES} bytes: shorten them."
            )
        self._headers[-1][half].extend(data)

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ApiError(413, f"The form has more than {MAX_PARTS} parts: send fewer.")
        headers = {bytes(name).lower(): bytes(value) for name, value in self._headers}
        self._header_bytes = 0
        encoding = headers.get(b"content-transfer-encoding", b"").strip().lower()
        if encoding not in _PLAIN:
            raise ApiError(
                400, f"A part is encoded as {shown(_text(encoding))}: send its bytes as they are."
            )
        disposition = headers.get(b"content-disposition", b"").decode("latin-1")
        kind, options = parse_options_header(disposition)
        if kind != b"form-data" or b"name" not in options:
            raise ApiError(
                400,
                "A part has no header Content-Disposition: form-data with a name: add it, as every "
                "client of multipart forms does.",
            )
        filename = options.get(b"filename")
        self._pieces.append(
            Part(_text(options[b"name"]), None if filename is None else _text(filename))
        )

    def _end(self) -> None:
        self.ended = True


def _boundary(content_type: str) -> bytes:
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
        raise ApiError(
            400,
            "The header Content-Type needs a boundary of up to "
            f"{MAX_BOUNDARY_BYTES} characters: multipart/form-data; boundary=...",
        )
    return boundary


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise ApiError(400, "A name in the form is not UTF-8: send it as such.") from None
