"""Chooses the next token of each sequence from its logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence as Seq

import torch
from torch import Tensor

from polydelta.engine.request import TokenLogprob
from polydelta.engine.sequence import SampledToken, Sequence
from polydelta.kernels.download import Download
from polydelta.kernels.ops import Kernels
from polydelta.kernels.sampling import SamplingRows
from polydelta.kernels.upload import upload


class SampledTokens:
    """What was sampled in a step: on the device at once, on the host when it has come there."""

    def __init__(self, tokens: Tensor, logits: Tensor, reported: Mapping[int, int]) -> None:
        """tokens: `[rows]` int64; logits: `[rows, vocab]`. reported: rows whose log probabilities
        are wanted, and of how many likeliest tokens beside the one that was chosen."""
        self.tokens = tokens
        self._reported = reported
        logprobs = _logprobs(tokens, logits, reported) if reported else ()
        self._download = Download(tokens, *logprobs)

    def wait(self) -> list[SampledToken]:
        """In the order of the rows."""
        tokens, *logprobs = (tensor.tolist() for tensor in self._download.wait())
        found: dict[int, TokenLogprob] = {}
        each = zip(self._reported.items(), *logprobs, strict=True)
        for (row, count), chosen, values, ids in each:
            top = zip(ids[:count], values[:count], strict=True)
            found[row] = TokenLogprob(tokens[row], chosen, tuple(top))
        return [SampledToken(token, found.get(row)) for row, token in enumerate(tokens)]


class Sampler:
    """Greedy or random, row by row; rows do not see each other.

    Each sequence draws from a random stream of its own, one number for each token, so that a seed
    gives the same tokens whatever else is in the batch.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._streams: dict[Sequence, torch.Generator] = {}

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> SampledTokens:
        """logits: `[sequences, vocab]` float32, changed in place. Nothing waits for the device."""
        device = logits.device
        if not sequences:
            return SampledTokens(torch.empty(0, dtype=torch.int64, device=device), logits, {})
        each = [sequence.request.sampling for sequence in sequences]
        for row, params in enumerate(each):
            if params.penalised:
                _penalise(logits[row], sequences[row])
            if params.logit_bias:
                _add_bias(logits[row], params.logit_bias)
        tokens = self._kernels.argmax(logits)
        random = [row for row, params in enumerate(each) if not params.greedy]
        if random:
            rows = upload(random, device)
            how = self._how([sequences[row] for row in random], device)
            tokens.index_copy_(0, rows, self._kernels.sample(logits.index_select(0, rows), how))
        reported = {
            row: params.logprobs for row, params in enumerate(each) if params.logprobs is not None
        }
        return SampledTokens(tokens, logits, reported)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is done: its random stream ends."""
        self._streams.pop(sequence, None)

    def _how(self, sequences: Seq[Sequence], device: torch.device) -> SamplingRows:
        each = [sequence.request.sampling for sequence in sequences]
        columns = [
            *(params.temperature for params in each),
            *(params.top_k for params in each),
            *(params.top_p for params in each),
            *(params.min_p for params in each),
            *(self._uniform(sequence) for sequence in sequences),
        ]
        return SamplingRows(*upload(columns, device, torch.float64).view(5, -1))

    def _uniform(self, sequence: Sequence) -> float:
        """The next number of the sequence's stream, in [0, 1)."""
        stream = self._streams.get(sequence)
        if stream is None:
            stream = self._streams[sequence] = torch.Generator()
            seed = sequence.request.sampling.seed
            if seed is None:
                stream.seed()
            else:
                stream.manual_seed(seed)
        return float(torch.rand((), generator=stream, dtype=torch.float64))


def _penalise(logits: Tensor, sequence: Sequence) -> None:
    """One row, `[vocab]`, in place."""
    params = sequence.request.sampling
    if params.repetition_penalty != 1.0:
        seen = upload(sorted(set(sequence.token_ids)), logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.num_output_tokens:
        occurrences = Counter(sequence.output_token_ids)
        output = upload(list(occurrences), logits.device)
        counts = upload(list(occurrences.values()), logits.device)
        logits[output] -= params.presence_penalty + params.frequency_penalty * counts


def _add_bias(logits: Tensor, bias: Mapping[int, float]) -> None:
    """One row, `[vocab]`, in place."""
    tokens = upload(list(bias), logits.device)
    logits[tokens] += upload(list(bias.values()), logits.device, logits.dtype)


def _logprobs(
    tokens: Tensor, logits: Tensor, reported: Mapping[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities before temperature and cuts, as OpenAI reports them: of the tokens that
    were chosen in these rows, `[reported]`, and of as many of the likeliest as any row wants, with
    their ids, `[reported, count]` each."""
    rows = upload(list(reported), logits.device)
    logprobs = logits.index_select(0, rows).log_softmax(-1)
    chosen = logprobs.gather(1, tokens.index_select(0, rows)[:, None]).squeeze(1)
    likeliest = logprobs.topk(max(reported.values()))
    return chosen, likeliest.values, likeliest.indices
