"""What can change in a model besides its linear layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polydelta.adapters_store import delta_kinds


@dataclass(frozen=True, eq=False)
class NormWeight:
    """A norm's weight is replaced. Of `model.layers.N.<norm>` or `model.norm`."""

    # [size]
    weight: Tensor

    kind = delta_kinds.NORM_WEIGHT


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of the embedding (`model.embed_tokens`) or of the head (`lm_head`) are replaced. Other
    deltas of the same module act on what is there then."""

    # [n], int64, ascending
    ids: Tensor
    # [n, hidden]
    rows: Tensor

    kind = delta_kinds.TOKEN_ROWS


@dataclass(frozen=True, eq=False)
class Prefix:
    """Ready-made keys and values before the sequence, which begins at position n then. Keys lie in
    the cache as they are, not rotated. Of `model`."""

    # [layers, 2, n, kv_heads, head_dim]: keys at 0 and values at 1 of the second axis
    keys_values: Tensor

    kind = delta_kinds.PREFIX


@dataclass(frozen=True, eq=False)
class Prompt:
    """Embeddings of n virtual tokens before the sequence, which begins at position n then. Of
    `model`."""

    # [n, hidden]
    embeddings: Tensor

    kind = delta_kinds.PROMPT


@dataclass(frozen=True, eq=False)
class Invocation:
    """The adapter acts from the last occurrence of these tokens in the prompt on, and not at all
    where they do not occur (activated LoRA, arXiv:2504.12397). Of `model`."""

    token_ids: tuple[int, ...]

    kind = delta_kinds.INVOCATION


ModelDelta = NormWeight | TokenRows | Prefix | Prompt | Invocation
