"""From sampled tokens to text that may be handed out, and the end of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polydelta.engine.models.tokenizer import Tokenizer
from polydelta.engine.request import FinishReason, SamplingParams


@dataclass(frozen=True)
class TextStep:
    """What one token adds."""

    text: str
    finish_reason: FinishReason | None = None
    # The stop string or stop token id that ended the request.
    stop_reason: str | int | None = None


class Detokenizer:
    """One request's text. What could be the start of a stop string is held back until it is
    certain that it is not."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._stream = tokenizer.stream(params.skip_special_tokens)
        self._token_ids: list[int] = []
        # Text of whole characters so far, in characters, handed out or held back.
        self._length = 0
        self._held = ""

    def push(self, token_id: int, last: bool = False) -> TextStep:
        """The effect of the next token: its text is empty while it is held back.

        last: no token can follow, however many were asked for.
        """
        params = self._params
        stops_here = token_id in params.stop_token_ids
        if stops_here or (token_id in self._tokenizer.eos_token_ids and not params.ignore_eos):
            return self._end(FinishReason.STOP, token_id if stops_here else None)
        self._token_ids.append(token_id)
        piece = self._stream.push(token_id)
        self._length += len(piece)
        self._held += piece
        if (stopped := self._stopped()) is not None:
            return stopped
        if last or len(self._token_ids) == params.max_tokens:
            return self._end(FinishReason.LENGTH)
        safe = len(self._held) - _overlap(self._held, params.stop)
        text, self._held = self._held[:safe], self._held[safe:]
        return TextStep(text)

    def _stopped(self) -> TextStep | None:
        """The end, where a stop string is in what is held: at the one that begins first."""
        if not self._params.stop:
            return None
        found = [(self._held.find(stop), stop) for stop in self._params.stop]
        place, stop = min((hit for hit in found if hit[0] >= 0), default=(0, None))
        if stop is None:
            return None
        end = place + len(stop) if self._params.include_stop_str_in_output else place
        return TextStep(self._held[:end], FinishReason.STOP, stop)

    def _end(self, reason: FinishReason, stop_reason: int | None = None) -> TextStep:
        """With what is still held, a character that was never completed included: in its token
        there may be a stop string before it."""
        whole = self._tokenizer.decode(self._token_ids, self._params.skip_special_tokens)
        self._held += whole[self._length :]
        return self._stopped() or TextStep(self._held, reason, stop_reason)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that is the beginning of a stop string."""
    if not stops:
        return 0
    longest = max(map(len, stops)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
