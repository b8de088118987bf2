"""The draw of one token from each row of logits: which tokens stay, and the one that falls to a
number between 0 and 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below it the division would overflow float32, and the draw is as good as greedy anyway.
LOWEST_TEMPERATURE = 1e-6
# Most nuclei are small: so many of the likeliest tokens are looked at before a full sort.
_NUCLEUS_GUESS = 256


@dataclass(frozen=True, eq=False)
class SamplingRows:
    """How the token of each row is drawn. Tensors are `[rows]` float64, where the logits are."""

    # Logits are divided by it; one below LOWEST_TEMPERATURE counts as that.
    temperature: Tensor
    # Tokens as likely as the so-manieth stay; 0 keeps all.
    top_k: Tensor
    # Of these, the fewest likeliest that together have this share, and those as likely as the
    # last of them (arXiv:1904.09751); 1 keeps all.
    top_p: Tensor
    # Of these, those that have at least this share of the likeliest one's (arXiv:2407.01082).
    min_p: Tensor
    # In [0, 1): where, in the order of their ids, the shares of those that stay add up to more.
    uniform: Tensor


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """logits: `[rows, vocab]` float32 -> token ids `[rows]` int64."""
    columns = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.uniform)
    each = zip(logits, *(column.tolist() for column in columns), strict=True)
    return torch.tensor([_draw(*one) for one in each], dtype=torch.int64, device=logits.device)


def kept(logits: Tensor, temperature: float, top_k: float, top_p: float, min_p: float) -> Tensor:
    """Probabilities `[vocab]` of one row's tokens, 0 where they are cut off; the others are not
    scaled to add up to 1 again."""
    probabilities = torch.softmax(logits / max(temperature, LOWEST_TEMPERATURE), -1)
    if 0 < top_k < len(probabilities):
        smallest = probabilities.topk(int(top_k)).values[-1]
        probabilities[probabilities < smallest] = 0.0
    if top_p < 1.0:
        probabilities[probabilities < _nucleus_floor(probabilities, top_p)] = 0.0
    if min_p > 0.0:
        probabilities[probabilities < min_p * probabilities.max()] = 0.0
    return probabilities


def _draw(
    logits: Tensor, temperature: float, top_k: float, top_p: float, min_p: float, uniform: float
) -> int:
    # Float64: over a large vocabulary a float32 sum loses the tail.
    cumulative = kept(logits, temperature, top_k, top_p, min_p).double().cumsum(-1)
    token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return min(token, len(cumulative) - 1)


def _nucleus_floor(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest probability among the likeliest tokens that together reach `top_p`."""
    needed = top_p * probabilities.sum()
    count = min(_NUCLEUS_GUESS, len(probabilities))
    likeliest = probabilities.topk(count).values
    if likeliest.sum() < needed:
        likeliest = probabilities.sort(descending=True).values
    reached = int(torch.searchsorted(likeliest.cumsum(-1), needed))
    return likeliest[min(reached, len(likeliest) - 1)]
