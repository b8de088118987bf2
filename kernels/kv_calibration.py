"""Which channels of keys tell what tokens matter (arXiv:2408.07092)."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.kernels.kv_selection import DoubleSparsity


class ChannelScores:
    """How much each channel adds to scores, whatever the sign: the sum of |q_c * k_c| over tokens
    with themselves, and over the query heads that a kv head has."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self._sums = torch.zeros(layers, kv_heads, head_dim, dtype=torch.float64, device=device)

    def add(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """Of one layer, as they meet, rotated: queries `[tokens, heads, head_dim]`, keys `[tokens,
        kv_heads, head_dim]`."""
        # [tokens, kv_heads, group, head_dim]
        grouped = queries.double().unflatten(1, (keys.shape[1], -1))
        self._sums[layer] += (grouped * keys.double()[:, :, None]).abs().sum((0, 2))

    def labels(self, share: int = DoubleSparsity.label_share) -> Tensor:
        """The head_dim // share channels with the highest scores, `[layers, kv_heads, labels]`
        int64, ascending; of equal ones the lower."""
        order = self._sums.argsort(dim=-1, descending=True, stable=True)
        return order[..., : self._sums.shape[-1] // share].sort(-1).values
