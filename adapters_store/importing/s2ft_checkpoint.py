"""Models that S2FT (arXiv:2412.06289) has tuned.

Its code puts the chosen heads and feed-forward channels first, trains these rows of v and up and
these columns of o and down, and saves the whole model in that order, without saying which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.formats.foreign import s2ft
from polydelta.adapters_store.importing.channel_matching import match_channels, match_heads, rows_of
from polydelta.adapters_store.importing.full_model import check_same_parts, replaced_modules
from polydelta.adapters_store.importing.new_adapter import NewAdapter

_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def import_s2ft(
    base: BaseLayout,
    tuned: BaseLayout,
    cut_vocabulary: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> NewAdapter:
    """Puts the tuned model's channels in the base's order and keeps the rows and columns that
    differ then, in float32; calls `progress(done, total)` after each layer.

    Both with their weights, rounded alike. The order is the one that makes q, k and gate the
    base's, which S2FT does not train; query heads may move within what reads one key-value head.
    Biases, norms, embedding and head are kept whole where they differ. cut_vocabulary: leave out
    tokens that the base has not, as S2FT's code appends some to fill up.

    Raises InvalidAdapterError when `tuned` cannot have been made of `base` in this way.
    """
    check_same_parts(base, tuned, cut_vocabulary)
    modules: dict[str, Mapping[str, Tensor]] = {}
    for layer in range(base.num_layers):
        order = _find_order(base, tuned, layer)
        for part in (_Q, _K, _V, _O, _GATE, _UP, _DOWN):
            module = base.module_name(layer, part)
            if changed := _changed(base, tuned, module, part, order):
                modules[module] = changed
        if progress is not None:
            progress(layer + 1, base.num_layers)
    replaced = replaced_modules(base, tuned, torch.float32)
    return NewAdapter("S2FT", modules, replaced, base.tied and tuned.tied)


@dataclass(frozen=True, eq=False)
class _Order:
    """Of the channels of one layer: where each of the tuned model's stands in the base."""

    # [heads * head_dim], [kv_heads * head_dim], [intermediate]; int64
    heads: Tensor
    kv_heads: Tensor
    channels: Tensor

    def outputs(self, part: str, rows: Tensor) -> Tensor:
        """rows: [out, *] of the tuned model -> in the base's order."""
        orders = {_Q: self.heads, _K: self.kv_heads, _V: self.kv_heads}
        orders |= {_GATE: self.channels, _UP: self.channels}
        return _undone(rows, orders[part]) if part in orders else rows

    def inputs(self, part: str, weight: Tensor) -> Tensor:
        """weight: [out, in] of the tuned model -> in the base's order."""
        orders = {_O: self.heads, _DOWN: self.channels}
        return _undone(weight.T, orders[part]).T if part in orders else weight


def _undone(rows: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(rows).index_copy_(0, order, rows)


def _find_order(base: BaseLayout, tuned: BaseLayout, layer: int) -> _Order:
    q, k, gate = (base.module_name(layer, part) for part in (_Q, _K, _GATE))
    heads, kv_heads = match_heads(
        f"the heads of {q!r} and {k!r}",
        (base.weight(q), base.weight(k)),
        (tuned.weight(q), tuned.weight(k)),
        base.num_kv_heads,
    )
    return _Order(
        rows_of(heads, base.head_dim),
        rows_of(kv_heads, base.head_dim),
        match_channels(f"the rows of {gate!r}", base.weight(gate), tuned.weight(gate)),
    )


def _changed(
    base: BaseLayout, tuned: BaseLayout, module: str, part: str, order: _Order
) -> dict[str, Tensor]:
    """By the format's parameters; empty when nothing has changed."""
    changed: dict[str, Tensor] = {}
    if part in (_V, _UP, _O, _DOWN):
        theirs = order.inputs(part, order.outputs(part, tuned.weight(module)))
        change = theirs - base.weight(module)
        if part in (_V, _UP):
            indices = change.any(dim=1).nonzero().squeeze(1)
            changed = {s2ft.INDICES: indices.int(), s2ft.ROWS: change[indices]}
        else:
            indices = change.any(dim=0).nonzero().squeeze(1)
            changed = {s2ft.INDICES: indices.int(), s2ft.COLUMNS: change[:, indices]}
        if not len(indices):
            changed = {}
    bias, base_bias = tuned.bias(module), base.bias(module)
    if bias is not None and base_bias is not None:
        # Its code leaves biases in their old order, and the model learns to do with that.
        bias_change = order.outputs(part, bias) - base_bias
        if bias_change.any():
            changed[s2ft.BIAS] = bias_change
    return changed
