"""The text that KV formats and selections are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

from polydelta.engine.kv_calibrating import MOST_TOKENS
from polydelta.engine.models.tokenizer import Tokenizer

NAME = "pydoc_data.topics (Python's own documentation)"
LICENCE = "PSF-2.0"


@dataclass(frozen=True)
class Text:
    """Measured from the beginning; its end is for calibration alone."""

    ids: Sequence[int]

    @classmethod
    def read(cls, tokenizer: Tokenizer) -> Text:
        return cls(tokenizer.encode("\n\n".join(topics.values())))

    @property
    def measured(self) -> Sequence[int]:
        return self.ids[:-MOST_TOKENS]

    @property
    def for_calibration(self) -> Sequence[int]:
        return self.ids[-MOST_TOKENS:]

    def windows(self, count: int, length: int) -> list[Sequence[int]]:
        """The first ones, one behind the other. Raises ValueError where there are fewer."""
        most = len(self.measured) // length
        if count > most:
            raise ValueError(f"The text has {most} windows of {length} tokens, not {count}.")
        return [self.ids[start : start + length] for start in range(0, count * length, length)]
