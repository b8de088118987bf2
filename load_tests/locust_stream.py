"""One streamed answer of an OpenAI-compatible server, read as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# What a piece of an answer may be in: completions, chats, models that think aloud.
TEXT_FIELDS = ("text", "content", "reasoning_content", "reasoning", "tool_calls")


class StreamError(Exception):
    """The server did not stream what was asked for."""


@dataclass
class Answer:
    """What came; times are of `time.perf_counter`."""

    # When the first piece of text came, and the last event, which may have no text but the token
    # that ends the answer; None before any text came.
    first: float | None = None
    last: float | None = None
    # Events with text.
    pieces: int = 0
    # As the server counts them, if it does.
    completion_tokens: int | None = None
    # Whether the client left before the end.
    left: bool = False
    # Whether all came as it must.
    complete: bool = False

    @property
    def tokens(self) -> int:
        """A piece may hold several tokens; without the server's count each counts as one."""
        return self.pieces if self.completion_tokens is None else self.completion_tokens

    @property
    def seconds_per_token(self) -> float | None:
        """After the first token; None where there are no two, or not all came."""
        if not self.complete or self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


def read_stream(
    next_line: Callable[[], bytes], answer: Answer, leave_after: int | None = None
) -> None:
    """Fills `answer`, to the end of the body or to where the client leaves.

    next_line: the next line of server-sent events, with its end; empty when there are no more.
    leave_after: pieces of text after which to leave; None: never. Raises StreamError, and what
    `next_line` raises; `answer` then has what came before.
    """
    done = False
    # After [DONE] too: only a connection whose answer is read to the end can be used again.
    while answer.pieces != leave_after:
        line = next_line()
        if not line:
            break
        field, _, value = line.strip().partition(b":")
        if field != b"data":
            continue
        value = value.strip()
        if value == b"[DONE]":
            done = True
        else:
            _take(_parsed(value), answer)
    else:
        answer.left = True
        return
    if not done:
        raise StreamError("the stream ended without [DONE]")
    if not answer.pieces:
        raise StreamError("the stream has no content")
    answer.complete = True


def _parsed(value: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(value)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise StreamError(f"an event is no JSON object: {value[:100].decode(errors='replace')}")
    return event


def _take(event: Mapping[str, Any], answer: Answer) -> None:
    if error := event.get("error"):
        raise StreamError(f"error event: {error_message(error)}")
    if usage := event.get("usage"):
        answer.completion_tokens = usage.get("completion_tokens")
    choices = event.get("choices") or ()
    now = time.perf_counter()
    if any(_delta(choice).get(name) for choice in choices for name in TEXT_FIELDS):
        answer.pieces += 1
        if answer.first is None:
            answer.first = now
    if choices and answer.first is not None:
        answer.last = now


def _delta(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """A chat's piece is in `delta`, a completion's in the choice itself."""
    return choice.get("delta") or choice


def error_message(error: object) -> str:
    """Of the `error` in a body or event, which is an object with a message almost everywhere."""
    return str(error.get("message", error) if isinstance(error, dict) else error)
