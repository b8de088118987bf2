"""Server-sent events: chunks as `data:` lines, errors in the same form, `[DONE]` at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from polydelta.engine.request import RequestOutput
from polydelta.server.errors import ApiError, error_body
from polydelta.server.openai.generation import Generation
from polydelta.server.openai.responses import Usage
from polydelta.server.openai.schemas import StreamOptions
from polydelta.server.openai.usage import UsageCount

logger = logging.getLogger(__name__)

# Proxies that buffer or cache would turn the stream into a whole body.
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Sends `chunks` as they come. The generation runs as long as the response does: whatever
    ends it (the last chunk, a client that hangs up, a server that stops) aborts what is left."""

    def __init__(self, generation: Generation, chunks: AsyncIterator[BaseModel]) -> None:
        super().__init__(_events(chunks), media_type="text/event-stream", headers=HEADERS)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation:
            await super().__call__(scope, receive, send)


async def _events(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield _event(chunk.model_dump_json(exclude_unset=True))
    except ApiError as error:
        yield _event(json.dumps(error_body(error.status, error.message, error.param)))
    except Exception:
        # The status line is long gone; the client must not take the stream for complete.
        logger.exception("A stream failed")
        yield _event(json.dumps(error_body(500, "The server failed; its log says why.")))
    yield _event("[DONE]")


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def worth_a_chunk(output: RequestOutput, options: StreamOptions) -> bool:
    """False while text is held back (half a character, the start of a stop string) and there is
    nothing else to tell."""
    return bool(output.text or output.logprobs or output.finished or options.continuous_usage_stats)


def reason(output: RequestOutput) -> str | None:
    """Why the choice ended, in its last chunk only."""
    return None if output.finish_reason is None else output.finish_reason.value


def chunk_usage(options: StreamOptions, usage: UsageCount) -> dict[str, Usage | None]:
    """The `usage` field of a content chunk: absent, null, or the count so far."""
    if options.continuous_usage_stats:
        return {"usage": usage.usage()}
    return {"usage": None} if options.include_usage else {}
