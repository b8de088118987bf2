"""Gathering the outputs of a generation into whole choices."""

from __future__ import annotations

from dataclasses import dataclass, field

from polydelta.engine.request import TokenLogprob
from polydelta.server.openai.generation import Generation
from polydelta.server.openai.usage import UsageCount


@dataclass
class WholeChoice:
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    # Empty until it has finished.
    finish_reason: str = ""
    stop_reason: str | int | None = None


async def collect(generation: Generation, count: int, usage: UsageCount) -> list[WholeChoice]:
    """The `count` choices, finished, in order. Raises ApiError when one of them failed."""
    choices = [WholeChoice() for _ in range(count)]
    while outputs := await generation.take():
        for index, output in outputs:
            usage.add(index, output)
            choice = choices[index]
            choice.text += output.text
            choice.logprobs += output.logprobs
            if output.finish_reason is not None:
                choice.finish_reason = output.finish_reason.value
                choice.stop_reason = output.stop_reason
    return choices
