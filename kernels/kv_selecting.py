"""Which tokens a query reads, and what pages note for that, in plain torch."""

from __future__ import annotations

from torch import Tensor

from polydelta.kernels.kv_memory import KVKind, KVMemory
from polydelta.kernels.ops import SequenceSlice


def select(
    kind: KVKind, layer: int, memory: KVMemory, part: SequenceSlice, queries: Tensor
) -> Tensor | None:
    """Positions that the slice's one query reads, `[kv_heads, n]` int64, ascending; None where the
    selection does not choose by query. queries: `[length, heads, head_dim]`."""
    return None


def summarize(kind: KVKind, layer: int, pages: Tensor, closing: Tensor) -> None:
    """Notes of pages that have become full what selections ask of them. closing: `[n]` int64."""
