"""Names of the delta kinds, for those who must not import torch to know them."""

from __future__ import annotations

LOW_RANK = "LowRank"
SPARSE = "Sparse"

KINDS = (LOW_RANK, SPARSE)

# Kinds of `y += dW x`: the sum of two is the sum of their matrices.
ADDABLE = frozenset({LOW_RANK, SPARSE})
