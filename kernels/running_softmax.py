"""Softmax over scores that come some at a time, and the values that it weighs."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RunningSoftmax:
    """The running softmax of arXiv:2205.14135."""

    def __init__(self, like: Tensor) -> None:
        """like: `[..., queries, head_dim]`, what comes out in the end."""
        self._highest = like.new_full((*like.shape[:-1], 1), -math.inf)
        self._total = torch.zeros_like(self._highest)
        self._mixed = torch.zeros_like(like)

    def add(self, scores: Tensor, seen: Tensor, values: Tensor) -> None:
        """scores: `[..., queries, n]`; seen: like them, bool; values: `[..., n, head_dim]`."""
        scores = scores.masked_fill(~seen, -math.inf)
        highest = torch.maximum(self._highest, scores.amax(-1, keepdim=True))
        # Where nothing was seen yet, there is nothing to fade.
        fade = torch.where(self._highest == highest, 1.0, (self._highest - highest).exp())
        weights = torch.where(seen, (scores - highest).exp(), 0.0)
        self._total = self._total * fade + weights.sum(-1, keepdim=True)
        self._mixed = self._mixed * fade + weights @ values
        self._highest = highest

    def result(self) -> Tensor:
        """Shape as said at first; of a query that has seen something."""
        return self._mixed / self._total
