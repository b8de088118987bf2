"""Any adapter as a LoRA: exactly where its changes are of low rank, else the nearest one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    LowRank,
    Matrix,
    NormWeight,
    Rotate,
    Scale,
    Side,
    TokenRows,
)
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.merged_model import check_mergeable, linear_weight
from polydelta.adapters_store.merged_weight import merge_into
from polydelta.adapters_store.nearest_low_rank import (
    Approximation,
    Truncation,
    nearest_low_rank,
    nearest_of_product,
    total_error,
)

# What is kept where neither a rank nor an energy is asked for, and the change is not of low rank.
DEFAULT_ENERGY = 0.9


@dataclass(frozen=True, eq=False)
class ConvertedModule:
    """A module's change as a LoRA has it."""

    change: Approximation[LowRank]
    # Exact; None where the output gets no bias.
    bias: Bias | None

    @property
    def deltas(self) -> tuple[Delta, ...]:
        low_rank = self.change.delta
        return (low_rank,) if self.bias is None else (low_rank, self.bias)


@dataclass(frozen=True, eq=False)
class ConvertedAdapter:
    """A LoRA, before it has files."""

    # By full module path.
    by_module: Mapping[str, ConvertedModule]

    @property
    def modules(self) -> dict[str, tuple[Delta, ...]]:
        """As in `Adapter.modules`; for each a LowRank, and a Bias where there is one."""
        return {name: module.deltas for name, module in self.by_module.items()}

    @property
    def error(self) -> float:
        """Relative Frobenius error of all weights together."""
        return total_error(module.change for module in self.by_module.values())


def to_low_rank(
    adapter: Adapter,
    layout: BaseLayout,
    truncation: Truncation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertedAdapter:
    """Makes a LoRA of an adapter; calls `progress(done, total)` after each module.

    What a module's deltas do to its weight is taken together, `dW = W' - W`, and truncated by
    singular value decomposition: to `truncation`, by default to DEFAULT_ENERGY. Where low-rank
    deltas are all there is, they are kept as they are, unless a truncation is asked for. What they
    do to the bias is kept exactly. Reads the base's weights where deltas depend on them, and takes
    the memory of one module's dense change in float64.

    Raises InvalidAdapterError for kinds that a LoRA has no place for, by name.
    """
    check_mergeable(adapter)
    for module, deltas in adapter.modules.items():
        for delta in deltas:
            if isinstance(delta, NormWeight | TokenRows):
                raise InvalidAdapterError(
                    f"The adapter replaces numbers of {module!r} (kind {delta.kind}), for which "
                    "low-rank matrices have no place: write a merged model instead (--to model)."
                )
    by_module: dict[str, ConvertedModule] = {}
    for module, deltas in adapter.modules.items():
        by_module[module] = _convert_module(module, deltas, layout, truncation)
        if progress is not None:
            progress(len(by_module), len(adapter.modules))
    return ConvertedAdapter(by_module)


def _convert_module(
    module: str, deltas: Sequence[Delta], layout: BaseLayout, truncation: Truncation | None
) -> ConvertedModule:
    bias = _bias_change(module, deltas, layout)
    is_low_rank = all(isinstance(delta, LowRank | Bias) for delta in deltas)
    if is_low_rank and truncation is None:
        return ConvertedModule(Approximation(_side_by_side(module, deltas, layout)), bias)
    truncation = truncation or Truncation(energy=DEFAULT_ENERGY)
    try:
        if is_low_rank:
            change = nearest_of_product(_side_by_side(module, deltas, layout), truncation)
        else:
            change = nearest_low_rank(_weight_change(module, deltas, layout), truncation)
    except FloatingPointError:
        raise InvalidAdapterError(
            f"The change of {module!r} has numbers beyond what float32 holds: take an earlier "
            "checkpoint."
        ) from None
    return ConvertedModule(change, bias)


def _side_by_side(module: str, deltas: Sequence[Delta], layout: BaseLayout) -> LowRank:
    """The sum of low-rank deltas; without any, one that is 0, for a file must have something."""
    low_rank = [delta for delta in deltas if isinstance(delta, LowRank)]
    if not low_rank:
        out_features, in_features = layout.target_shapes[module]
        return LowRank(torch.zeros(1, in_features), torch.zeros(out_features, 1))
    return LowRank(
        torch.cat([delta.a for delta in low_rank]), torch.cat([delta.b for delta in low_rank], 1)
    )


def _weight_change(module: str, deltas: Sequence[Delta], layout: BaseLayout) -> Tensor:
    """`W' - W`, `[out, in]` float32."""
    acting = [delta for delta in deltas if not isinstance(delta, Bias)]
    if all(isinstance(delta, Matrix) for delta in acting):
        base = torch.zeros(layout.target_shapes[module], dtype=torch.float64)
    else:
        base = linear_weight(layout, module).double()
    # In float64, because what differs little from W would be lost among W's last digits.
    merged, _ = merge_into(base, None, acting)
    return (merged - base).float()


def _bias_change(module: str, deltas: Sequence[Delta], layout: BaseLayout) -> Bias | None:
    """None when the deltas do nothing to the bias."""
    acting = [
        delta
        for delta in deltas
        if isinstance(delta, Bias | Rotate)
        or (isinstance(delta, Scale) and delta.side is Side.OUTPUT)
    ]
    bias = layout.bias(module)
    # The weight is not asked for, so it may be one without columns.
    _, merged = merge_into(torch.zeros(layout.target_shapes[module][0], 0), bias, acting)
    if merged is None or not acting:
        return None
    return Bias(merged if bias is None else merged - bias)
