"""How far apart two adapters' predictions are, as the engine itself computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.engine import Engine
from polydelta.engine.request import (
    FinishReason,
    GenerationRequest,
    RequestOutput,
    SamplingParams,
)


@dataclass(frozen=True)
class Drift:
    """Between two sets of predictions for the same places, logits taken as log probabilities."""

    # Of the absolute differences, over all places and tokens.
    largest: float
    mean: float
    # Kullback-Leibler divergence of the second from the first, in nats, over the places.
    largest_divergence: float
    mean_divergence: float


def log_probabilities(
    engine: Engine, token_ids: Sequence[int], adapter: AdapterRef | None
) -> Tensor:
    """`[tokens, vocab]` float32: in row i what follows the first i + 1 tokens. The engine is
    started. Raises InvalidAdapterError for an adapter that it does not serve."""
    vocab_size = engine.vocab_size
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=vocab_size)
    shares = () if adapter is None else (Share(adapter),)
    outputs: SimpleQueue[RequestOutput] = SimpleQueue()
    # Every place is a request of its own; the prefix cache makes them one pass or little more.
    for place in range(len(token_ids)):
        prompt = list(token_ids[: place + 1])
        request = GenerationRequest(str(place), prompt, sampling, shares)
        engine.submit(request, outputs.put)
    found = torch.empty(len(token_ids), vocab_size)
    missing = len(token_ids)
    while missing:
        output = outputs.get()
        if output.finish_reason is FinishReason.ERROR:
            raise InvalidAdapterError(
                output.error.message if output.error else "The engine failed."
            )
        for predicted in output.logprobs:
            tokens, values = zip(*predicted.top, strict=True)
            found[int(output.request_id), list(tokens)] = torch.tensor(values)
        missing -= output.finished
    return found


def drift(first: Tensor, second: Tensor) -> Drift:
    """Both `[tokens, vocab]` log probabilities."""
    apart = (first - second).abs()
    divergence = (first.exp() * (first - second)).sum(-1)
    return Drift(
        float(apart.max()), float(apart.mean()), float(divergence.max()), float(divergence.mean())
    )
