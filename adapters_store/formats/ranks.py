"""How large a rank may be, compared with the layer that it is for.

No matrix has a rank above its smaller side, but adapters may have one: over narrow layers, where
the config gives all layers the same, and where the rank is a product. Factors that are in the file
are as large as they are. But a config's number alone must not make large matrices, so far above the
layer's side it is refused there; and below that, the change and an identity take the place of the
factors, which are smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError

# Times the smaller side. VeRA's usual 1024 is 5.3 times the outputs of a v_proj with 192.
MOST = 8


def check_rank(module: str, rank: int, shape: tuple[int, int]) -> None:
    """shape: of the base's layer. Raises InvalidAdapterError for a rank that is far above what a
    change of it can have."""
    if rank > MOST * min(shape):
        raise InvalidAdapterError(
            f"The change of {module[:200]!r} would have rank {rank}, but no more than {min(shape)} "
            f"counts in the base model's layer of shape {list(shape)}, and at most {MOST} times as "
            "much is read: train with a smaller r."
        )


def reduced(delta: LowRank) -> LowRank:
    """The same change, of a rank no larger than its smaller side."""
    return low_rank_of(delta.dense()) if delta.rank > min(delta.shape) else delta


def low_rank_of(change: Tensor) -> LowRank:
    """change: `[out, in]`. Exact, of the rank of the smaller side."""
    outputs, inputs = change.shape
    if outputs <= inputs:
        return LowRank(change, torch.eye(outputs))
    return LowRank(torch.eye(inputs), change)
