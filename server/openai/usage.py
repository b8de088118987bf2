"""Counting tokens for the `usage` of a response."""

from __future__ import annotations

from collections.abc import Sequence

from polydelta.engine.request import RequestOutput
from polydelta.server.openai.responses import PromptTokensDetails, Usage


class UsageCount:
    """Grows with every output. A prompt counts once, however many choices it has."""

    def __init__(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        self._prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._completion_tokens = 0
        # Of the first choice of each prompt: the others find what the first one left.
        self._cached_tokens = [0] * len(prompts)
        self._n = n

    def add(self, index: int, output: RequestOutput) -> None:
        self._completion_tokens += len(output.token_ids)
        prompt, choice = divmod(index, self._n)
        if choice == 0:
            self._cached_tokens[prompt] = max(self._cached_tokens[prompt], output.cached_tokens)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached_tokens)),
        )
