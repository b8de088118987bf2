"""The delta algebra: what a fine-tuned variant changes in the base model.

A format (PEFT LoRA, SHiRA, ...) is a parser from files to these kinds; the engine and the kernels
know only the kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polydelta.adapters_store.linear_deltas import (
    Bias,
    Circulant,
    Columns,
    Dense,
    Kronecker,
    LinearDelta,
    LowRank,
    Matrix,
    OneBit,
    Rotate,
    Rows,
    Scale,
    Side,
    Sparse,
    TopK,
)
from polydelta.adapters_store.model_deltas import (
    Invocation,
    ModelDelta,
    NormWeight,
    Prefix,
    Prompt,
    TokenRows,
)

__all__ = [
    "Adapter",
    "Bias",
    "Circulant",
    "Columns",
    "Delta",
    "Dense",
    "Invocation",
    "Kronecker",
    "LinearDelta",
    "LowRank",
    "Matrix",
    "ModelDelta",
    "NormWeight",
    "OneBit",
    "Prefix",
    "Prompt",
    "Rotate",
    "Rows",
    "Scale",
    "Side",
    "Sparse",
    "TokenRows",
    "TopK",
]

Delta = LinearDelta | ModelDelta


@dataclass(frozen=True, eq=False)
class Adapter:
    """One immutable version of a fine-tuned variant.

    `digest` is the sha256 of the adapter's content: it, not the name, seeds the prefix cache.
    """

    id: str
    version: int
    digest: str
    # The format it was read from, e.g. "LORA" or "SHIRA".
    format: str
    # Full module path -> the deltas of that module; what concerns no single one is under "model".
    modules: Mapping[str, tuple[Delta, ...]]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({d.kind for deltas in self.modules.values() for d in deltas}))

    @property
    def max_rank(self) -> int:
        """The largest rank of a delta in it; 0 when none has one."""
        ranks = [
            d.rank
            for deltas in self.modules.values()
            for d in deltas
            if isinstance(d, LowRank | TopK)
        ]
        return max(ranks, default=0)
