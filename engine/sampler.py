"""Chooses the next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from polydelta.engine.request import SamplingParams, TokenLogprob
from polydelta.engine.sequence import SampledToken, Sequence
from polydelta.kernels.ops import Kernels

# Below it the division would overflow float32, and the draw is as good as greedy anyway.
_LOWEST_TEMPERATURE = 1e-6
# Most nuclei are small: so many of the likeliest tokens are looked at before a full sort.
_NUCLEUS_GUESS = 256


class SampledTokens:
    """What was sampled in a step."""

    def __init__(self, tokens: Tensor, sampled: list[SampledToken]) -> None:
        # [rows] int64
        self.tokens = tokens
        self._sampled = sampled

    def wait(self) -> list[SampledToken]:
        return self._sampled


class Sampler:
    """Greedy or random, row by row; rows do not see each other.

    Each sequence draws from a random stream of its own, one number for each token, so that a seed
    gives the same tokens whatever else is in the batch.
    """

    def __init__(self, vocab_size: int, kernels: Kernels) -> None:
        self._vocab_size = vocab_size
        self._kernels = kernels
        self._streams: dict[Sequence, torch.Generator] = {}

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> SampledTokens:
        """logits: `[sequences, vocab]` float32, changed in place."""
        if not sequences:
            return SampledTokens(torch.empty(0, dtype=torch.int64), [])
        for row, sequence in zip(logits, sequences, strict=True):
            self._adjust(row, sequence)
        likeliest: list[int] = self._kernels.argmax(logits).tolist()
        tokens: list[SampledToken] = []
        for row, sequence, best in zip(logits, sequences, likeliest, strict=True):
            params = sequence.request.sampling
            token = best if params.greedy else self._draw(row, sequence)
            tokens.append(SampledToken(token, _logprob(row, token, params)))
        return SampledTokens(torch.tensor([t.token_id for t in tokens]), tokens)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is done: its random stream ends."""
        self._streams.pop(sequence, None)

    def _adjust(self, logits: Tensor, sequence: Sequence) -> None:
        """Penalties and biases on one row, `[vocab]`, in place."""
        params = sequence.request.sampling
        if params.penalised:
            _penalise(logits, sequence)
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias))
            logits[tokens] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype)

    def _draw(self, logits: Tensor, sequence: Sequence) -> int:
        params = sequence.request.sampling
        probabilities = torch.softmax(logits / max(params.temperature, _LOWEST_TEMPERATURE), -1)
        _truncate(probabilities, params)
        # Float64: over a large vocabulary a float32 sum loses the tail.
        cumulative = probabilities.double().cumsum(-1)
        target = self._uniform(sequence) * cumulative[-1]
        token = int(torch.searchsorted(cumulative, target, right=True))
        return min(token, self._vocab_size - 1)

    def _uniform(self, sequence: Sequence) -> Tensor:
        """The next number of the sequence's stream, in [0, 1)."""
        stream = self._streams.get(sequence)
        if stream is None:
            stream = self._streams[sequence] = torch.Generator()
            seed = sequence.request.sampling.seed
            if seed is None:
                stream.seed()
            else:
                stream.manual_seed(seed)
        return torch.rand((), generator=stream, dtype=torch.float64)


def _penalise(logits: Tensor, sequence: Sequence) -> None:
    params = sequence.request.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)))
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.num_output_tokens:
        output, counts = torch.tensor(sequence.output_token_ids).unique(return_counts=True)
        logits[output] -= params.presence_penalty + params.frequency_penalty * counts


def _truncate(probabilities: Tensor, params: SamplingParams) -> None:
    """Zeroes what top-k, top-p and min-p cut off, in this order; `[vocab]`, in place."""
    if 0 < params.top_k < len(probabilities):
        smallest = probabilities.topk(params.top_k).values[-1]
        probabilities[probabilities < smallest] = 0.0
    if params.top_p < 1.0:
        probabilities[probabilities < _nucleus_floor(probabilities, params.top_p)] = 0.0
    if params.min_p > 0.0:
        probabilities[probabilities < params.min_p * probabilities.max()] = 0.0


def _nucleus_floor(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest probability among the likeliest tokens that together reach `top_p`."""
    needed = top_p * probabilities.sum()
    count = min(_NUCLEUS_GUESS, len(probabilities))
    likeliest = probabilities.topk(count).values
    if likeliest.sum() < needed:
        likeliest = probabilities.sort(descending=True).values
    reached = int(torch.searchsorted(likeliest.cumsum(-1), needed))
    return likeliest[min(reached, len(likeliest) - 1)]


def _logprob(logits: Tensor, token: int, params: SamplingParams) -> TokenLogprob | None:
    """Log probabilities before temperature and truncation, as OpenAI reports them."""
    if params.logprobs is None:
        return None
    logprobs = torch.log_softmax(logits, -1)
    top = logprobs.topk(params.logprobs) if params.logprobs else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
    return TokenLogprob(token, float(logprobs[token]), pairs)
