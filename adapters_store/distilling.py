"""A full fine-tune made into an adapter of one bit for each weight: BitDelta (arXiv:2402.10193)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.foreign import bitdelta
from polydelta.adapters_store.importing.full_model import check_same_parts, replaced_modules
from polydelta.adapters_store.importing.new_adapter import NewAdapter


@dataclass(frozen=True, eq=False)
class Distilled:
    """The adapter, and how far it falls short of the fine-tune."""

    adapter: NewAdapter
    # Full path of each linear layer with a change -> relative Frobenius error of its change.
    errors: Mapping[str, float]

    @property
    def mean_error(self) -> float:
        return math.fsum(self.errors.values()) / len(self.errors) if self.errors else 0.0


def distill(
    base: BaseLayout,
    tuned: BaseLayout,
    dtype: torch.dtype = torch.bfloat16,
    cut_vocabulary: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Distilled:
    """Reads one layer of both after the other, in float32; calls `progress(done, total)` after
    each.

    Both with their weights, rounded alike. Of every linear layer the signs of `dW = tuned - base`
    are kept, and the mean of `|dW|` as their scale, which no other brings nearer to dW (Frobenius
    norm). Biases, norms, embedding and head are kept whole where they differ: embedding and head in
    `dtype`. cut_vocabulary: leave out tokens that the base has not.

    Raises InvalidAdapterError when `tuned` cannot be a fine-tune of `base`, or has numbers that are
    not finite.
    """
    check_same_parts(base, tuned, cut_vocabulary)
    modules: dict[str, Mapping[str, Tensor]] = {}
    errors: dict[str, float] = {}
    for done, module in enumerate(base.module_shapes, 1):
        parameters: dict[str, Tensor] = {}
        change = tuned.weight(module) - base.weight(module)
        if change.any():
            parameters, errors[module] = _one_bit(module, change)
        bias, base_bias = tuned.bias(module), base.bias(module)
        if bias is not None and base_bias is not None and not torch.equal(bias, base_bias):
            parameters[bitdelta.BIAS] = bias - base_bias
        if parameters:
            modules[module] = parameters
        if progress is not None:
            progress(done, len(base.module_shapes))
    replaced = replaced_modules(base, tuned, dtype)
    adapter = NewAdapter("BITDELTA", modules, replaced, base.tied and tuned.tied)
    return Distilled(adapter, errors)


def _one_bit(module: str, change: Tensor) -> tuple[dict[str, Tensor], float]:
    """change: [out, in], not 0 everywhere. What the file has of it, and its relative error."""
    sizes = change.abs()
    scale = sizes.mean()
    if not torch.isfinite(scale):
        raise InvalidAdapterError(
            f"The change of {module!r} is not finite: the training run diverged; take an earlier "
            "checkpoint."
        )
    error = float((sizes - scale).norm() / sizes.norm())
    return {
        bitdelta.BITS: bitdelta.pack_signs(change),
        bitdelta.SCALE: scale.reshape(1),
    }, error
