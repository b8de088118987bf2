"""Integers that change with every step, in device memory that stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polydelta.kernels.upload import upload


class StaticInts:
    """A buffer of fixed capacity. What a recorded step reads is in one, so that it can be replayed
    with the content of another."""

    def __init__(self, values: Sequence[int], capacity: int, device: torch.device) -> None:
        """What is not given is 0, and is not sent. Raises ValueError for more values than the
        capacity."""
        if len(values) > capacity:
            raise ValueError(f"{len(values)} integers do not fit a buffer of {capacity}")
        # [capacity] int32
        self.tensor = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.tensor[: len(values)] = upload(values, device, torch.int32)
        # Beyond them there are zeros.
        self._used = len(values)

    def assume(self, other: StaticInts) -> None:
        """Takes the content of a buffer of the same capacity."""
        different = max(self._used, other._used)
        self.tensor[:different].copy_(other.tensor[:different])
        self._used = other._used
