"""Log probabilities in OpenAI's two shapes: parallel lists (completions), objects (chat)."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polydelta.engine.request import TokenLogprob
from polydelta.server.openai.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.models.tokenizer import Tokenizer

# JSON has no -inf; OpenAI writes this for a probability of zero.
LOWEST = -9999.0


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; its bytes written out when they are only part of a character, so that
    different tokens never share a label."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobsWriter:
    """Writes the lists of one choice, piece by piece; keeps count of the text offset."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Characters split over tokens count where their last byte comes.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        offsets = []
        for entry in logprobs:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(entry.token_id)))
        return CompletionLogprobs(
            tokens=[token_label(self._tokenizer, entry.token_id) for entry in logprobs],
            token_logprobs=[max(entry.logprob, LOWEST) for entry in logprobs],
            top_logprobs=[self._alternatives(entry) for entry in logprobs],
            text_offset=offsets,
        )

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and, as OpenAI has it, always the chosen one too."""
        pairs = dict(entry.top) | {entry.token_id: entry.logprob}
        return {
            token_label(self._tokenizer, token_id): max(logprob, LOWEST)
            for token_id, logprob in pairs.items()
        }


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    def candidate(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=token_label(tokenizer, token_id),
            logprob=max(logprob, LOWEST),
            bytes=list(tokenizer.token_bytes(token_id)),
        )

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **candidate(entry.token_id, entry.logprob).model_dump(),
                top_logprobs=[candidate(*alternative) for alternative in entry.top],
            )
            for entry in logprobs
        ]
    )
