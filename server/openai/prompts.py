"""From what a client wrote to token ids that the engine can take, or an error that says why not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from polydelta.server.errors import ApiError
from polydelta.server.openai.schemas import Message

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.engine import Engine

T = TypeVar("T")

# Tokenising this much takes about a millisecond; what is longer must not hold up the event loop.
LONG_TEXT = 4096


async def encode_prompts(
    engine: Engine, prompts: Sequence[str | tuple[int, ...]]
) -> list[Sequence[int]]:
    """Token ids of each prompt of `/v1/completions`, checked. Raises ApiError."""

    def encode() -> list[Sequence[int]]:
        return [engine.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]

    size = sum(len(prompt) for prompt in prompts)
    encoded = await _in_thread_if_long(size, encode)
    for token_ids in encoded:
        _check(engine, token_ids, "prompt")
    return encoded


async def encode_chat(engine: Engine, messages: Sequence[Message]) -> Sequence[int]:
    """Token ids of a conversation, up to where the assistant speaks, checked. Raises ApiError."""
    conversation = [message.for_template() for message in messages]
    size = sum(len(message.content) for message in messages)
    try:
        encoded = await _in_thread_if_long(size, lambda: engine.tokenizer.chat(conversation))
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", "messages") from None
    _check(engine, encoded, "messages")
    return encoded


async def _in_thread_if_long(size: int, work: Callable[[], T]) -> T:
    return work() if size < LONG_TEXT else await asyncio.to_thread(work)


def _check(engine: Engine, token_ids: Sequence[int], param: str) -> None:
    if not token_ids:
        raise ApiError(400, f"{param}: there is no token in it; a prompt needs one at least", param)
    window = engine.max_model_len
    if len(token_ids) >= window:
        raise ApiError(
            400,
            f"{param}: the prompt has {len(token_ids)} tokens, and the context window of {window}"
            " tokens must hold the prompt and one more; shorten the prompt.",
            param,
        )
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < engine.vocab_size:
            raise ApiError(
                400,
                f"{param}: token id {token_id} is out of the vocabulary,"
                f" which has ids 0 to {engine.vocab_size - 1}.",
                param,
            )
