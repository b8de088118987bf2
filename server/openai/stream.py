"""Server-sent events: chunks as `data:` lines, errors in the same form, `[DONE]` at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Protocol

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from polydelta.engine.request import RequestOutput
from polydelta.server.errors import ApiError, error_body
from polydelta.server.metrics import Refusals
from polydelta.server.openai.generation import Generation, unless_client_leaves
from polydelta.server.openai.responses import Usage
from polydelta.server.openai.schemas import StreamOptions
from polydelta.server.openai.usage import UsageCount

logger = logging.getLogger(__name__)

# Proxies that buffer or cache would turn the stream into a whole body.
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# As pydantic does it; `json.dumps` would make an encoder for every string.
_encode = json.JSONEncoder(ensure_ascii=False).encode
# Stands for the text while a chunk is cut; no other field can be it.
_TEXT = "\0"

# Each with its choice.
Outputs = Sequence[tuple[int, RequestOutput]]


class Reply(Protocol):
    """Makes the chunks of one stream."""

    # Grows with every output.
    usage: UsageCount

    def opening(self) -> Sequence[BaseModel]:
        """Chunks before all outputs."""

    def chunk(self, index: int, output: RequestOutput) -> BaseModel:
        """Of an output of a choice."""

    def closing(self) -> Sequence[BaseModel]:
        """Chunks after all outputs."""


class EventStream(StreamingResponse):
    """Sends the chunks of a reply, as many at a time as have come. The generation runs as long as
    the response does: whatever ends it (the last chunk, a client that hangs up, a server that
    stops) aborts what is left.

    The headers go out with the first output: what is refused before has the status that says so,
    and only what fails later is an event in a success.
    """

    def __init__(
        self, generation: Generation, reply: Reply, options: StreamOptions, refusals: Refusals
    ) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers=HEADERS)
        self._generation = generation
        self._reply = reply
        self._writer = ChunkWriter(reply, options)
        self._refusals = refusals
        self._first: Outputs = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError when there is no first output."""
        with self._generation:
            request = Request(scope, receive)
            self._first = await unless_client_leaves(request, self._generation.take())
            await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            if opening := self._reply.opening():
                yield _events(map(_to_json, opening))
            outputs = self._first
            while outputs:
                if written := self._writer.write(outputs):
                    yield _events(written)
                outputs = await self._generation.take()
            if closing := self._reply.closing():
                yield _events(map(_to_json, closing))
        except ApiError as error:
            self._refusals.count(error.status, error.reason)
            yield _events([json.dumps(error_body(error.status, error.message, error.param))])
        except Exception:
            # The status line is long gone; the client must not take the stream for complete.
            logger.exception("A stream failed")
            self._refusals.count(500)
            yield _events([json.dumps(error_body(500, "The server failed; its log says why."))])
        yield _events(["[DONE]"])


class ChunkWriter:
    """Writes outputs as JSON of chunks.

    Nearly every chunk adds text and nothing else. Such a chunk is made once for each choice, and
    cut where its text stands: the pieces are the same for all others.
    """

    def __init__(self, reply: Reply, options: StreamOptions) -> None:
        self._reply = reply
        self._options = options
        # Choice -> what stands before its text, and what after it.
        self._pieces: dict[int, tuple[str, str]] = {}

    def write(self, outputs: Outputs) -> list[str]:
        written = []
        for index, output in outputs:
            self._reply.usage.add(index, output)
            if output.logprobs or output.finished or self._options.continuous_usage_stats:
                written.append(_to_json(self._reply.chunk(index, output)))
            elif output.text:  # else it is held back: half a character, the start of a stop string
                before, after = self._pieces.get(index) or self._cut(index)
                written.append(f"{before}{_encode(output.text)}{after}")
        return written

    def _cut(self, index: int) -> tuple[str, str]:
        whole = _to_json(self._reply.chunk(index, RequestOutput("", _TEXT, ())))
        before, _, after = whole.partition(_encode(_TEXT))
        self._pieces[index] = before, after
        return before, after


def _to_json(chunk: BaseModel) -> str:
    return chunk.model_dump_json(exclude_unset=True)


def _events(data: Iterable[str]) -> bytes:
    return "".join(f"data: {one}\n\n" for one in data).encode()


def reason(output: RequestOutput) -> str | None:
    """Why the choice ended, in its last chunk only."""
    return None if output.finish_reason is None else output.finish_reason.value


def chunk_usage(options: StreamOptions, usage: UsageCount) -> dict[str, Usage | None]:
    """The `usage` field of a content chunk: absent, null, or the count so far."""
    if options.continuous_usage_stats:
        return {"usage": usage.usage()}
    return {"usage": None} if options.include_usage else {}
