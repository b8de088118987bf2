"""From a request body to the engine's sampling parameters; checks what needs the model to check."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from polydelta.engine.request import SamplingParams
from polydelta.server.errors import ApiError, shown
from polydelta.server.openai.schemas import SEED_LIMIT, GenerationFields

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.engine import Engine

TOKEN_ID = re.compile(r"[0-9]{1,18}")


def output_limit(
    engine: Engine, prompt_tokens: int, wanted: int | None, param: str, default: int | None = None
) -> int:
    """How many tokens a choice may have.

    `wanted` must fit into the window beside the prompt: ApiError 400 if not. What the client left
    open is `default`, or all the room there is, whichever is less.
    """
    room = engine.max_model_len - prompt_tokens
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        raise ApiError(
            400,
            f"{param}: {prompt_tokens} prompt tokens and {param}={wanted} make"
            f" {prompt_tokens + wanted}, over the context window of {engine.max_model_len} tokens;"
            f" ask for {room} at most.",
            param,
        )
    return wanted


def sampling_params(
    engine: Engine, body: GenerationFields, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """Of the first choice. Raises ApiError for token ids out of the vocabulary."""
    for token_id in body.stop_token_ids:
        _check_token(engine, token_id, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        seed=body.seed,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(engine, body.logit_bias),
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        skip_special_tokens=body.skip_special_tokens,
    )


def for_choices(sampling: SamplingParams, n: int) -> Iterator[SamplingParams]:
    """One for each choice: choice `i` has the seed plus `i`, or all would be the same."""
    for index in range(n):
        if sampling.seed is None:
            yield sampling
        else:
            # Around the end of 64 bits, where a client may start.
            seed = (sampling.seed + index + SEED_LIMIT + 1) % (2 * SEED_LIMIT + 2) - SEED_LIMIT - 1
            yield replace(sampling, seed=seed)


def _logit_bias(engine: Engine, wanted: dict[str, float]) -> dict[int, float]:
    bias = {}
    for key, value in wanted.items():
        if not TOKEN_ID.fullmatch(key):
            raise ApiError(
                400, f"logit_bias: the key {shown(key)} is not a token id.", "logit_bias"
            )
        token_id = int(key)
        _check_token(engine, token_id, "logit_bias")
        bias[token_id] = value
    return bias


def _check_token(engine: Engine, token_id: int, param: str) -> None:
    if not 0 <= token_id < engine.vocab_size:
        raise ApiError(
            400,
            f"{param}: token id {shown(token_id)} is out of the vocabulary,"
            f" which has ids 0 to {engine.vocab_size - 1}.",
            param,
        )
