"""Whether an adapter can be packed over a base at all."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, MODEL, BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    Dense,
    Invocation,
    LinearDelta,
    LowRank,
    Matrix,
    NormWeight,
    Prefix,
    Prompt,
    Rotate,
    Scale,
    Side,
    TokenRows,
    TopK,
)
from polydelta.adapters_store.errors import InvalidAdapterError

# Of these the base's head or embedding can have deltas, beside TokenRows.
_OF_TOKENS = LowRank | Scale | Bias


def check_adapter(adapter: Adapter, layout: BaseLayout, dtype: torch.dtype) -> None:
    """Raises InvalidAdapterError for deltas that do not fit the base, that have numbers which do
    not fit the dtype, or that are not served."""
    for module, deltas in adapter.modules.items():
        for delta in deltas:
            if isinstance(delta, Dense):
                raise InvalidAdapterError(
                    f"The adapter's format is {adapter.format}, whose change of {module!r} has no "
                    "exact form that is cheaper than the layer itself, so it is not served: "
                    "`polydelta adapters convert` writes the nearest LoRA."
                )
            expected = _expected_shape(delta, module, layout)
            if expected is None or _shape(delta) != expected:
                raise InvalidAdapterError(_misfit(module, delta))
            _check_range(module, delta, dtype)


def _expected_shape(delta: Delta, module: str, layout: BaseLayout) -> tuple[int, ...] | None:
    """What `_shape` must say; None when the module cannot have such a delta."""
    if module == MODEL:
        match delta:
            case Prefix():
                return (layout.num_layers, 2, layout.num_kv_heads, layout.head_dim)
            case Prompt():
                return (layout.hidden_size,)
            case Invocation():
                return ()
        return None
    if isinstance(delta, NormWeight):
        size = layout.norm_sizes.get(module)
        return None if size is None else (size,)
    of_tokens = module in (EMBEDDING, HEAD)
    if of_tokens and isinstance(delta, TokenRows):
        return (layout.hidden_size,)
    served = isinstance(delta, _OF_TOKENS if of_tokens else LinearDelta)
    if not served or (of_tokens and _on_input(delta)):
        return None
    shape = layout.target_shapes.get(module)
    if shape is None or isinstance(delta, Matrix | TopK):
        return shape
    return shape[1:] if _on_input(delta) else shape[:1]


def _on_input(delta: Delta) -> bool:
    return isinstance(delta, Scale) and delta.side is Side.INPUT


def _shape(delta: Delta) -> tuple[int, ...]:
    """What the base model decides of a delta's size."""
    match delta:
        case Prefix(values):
            return (*values.shape[:2], *values.shape[3:])
        case Prompt(embeddings) | TokenRows(_, embeddings):
            return tuple(embeddings.shape[1:])
        case Invocation():
            return ()
        case NormWeight(vector) | Scale(vector) | Bias(vector) | Rotate(vector):
            return tuple(vector.shape)
        case _:
            return delta.shape


def _misfit(module: str, delta: Delta) -> str:
    shape = _shape(delta)
    what = f" of shape {list(shape)}" if shape else ""
    return (
        f"The adapter changes {module!r} by a delta of kind {delta.kind}{what}, which the base "
        "model does not have or which is not served there: load it over the base that it was "
        "trained on."
    )


def _check_range(module: str, delta: Delta, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for field in fields(delta):
        value = getattr(delta, field.name)
        if isinstance(value, float):
            value = torch.tensor(value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        # Not of `abs`, which would be a copy.
        largest = max(abs(extreme.item()) for extreme in value.aminmax()) if value.numel() else 0.0
        if not largest <= limit:
            raise InvalidAdapterError(
                f"The adapter changes {module!r} by {largest:g}, which does not fit {dtype} "
                f"(up to {limit:g}): serve in a wider dtype, or take an earlier checkpoint."
            )
