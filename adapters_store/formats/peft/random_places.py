"""Places that PEFT draws from a seed, the same ones for all modules of a size."""

from __future__ import annotations

import torch
from torch import Tensor


class RandomPlaces:
    """Of one adapter: a shuffle of all entries of a large layer takes seconds, so each size is
    shuffled once; and what an upload makes large goes with it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._shuffled: dict[int, Tensor] = {}

    def __call__(self, entries: int, count: int) -> Tensor:
        """The first `count` of the numbers below `entries`, shuffled: `[count]` int64."""
        if entries not in self._shuffled:
            generator = torch.Generator().manual_seed(self._seed)
            # Another dtype makes the same shuffle.
            dtype = torch.int32 if entries < 1 << 31 else torch.int64
            self._shuffled[entries] = torch.randperm(entries, generator=generator, dtype=dtype)
        return self._shuffled[entries][:count].long()
