"""A base model with an adapter in its weights: what serving the adapter unmerged must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    Invocation,
    NormWeight,
    Prefix,
    Prompt,
    TokenRows,
    TopK,
)
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.merged_weight import merge_into

# Why no weight amounts to it.
_UNMERGEABLE = {
    TopK: "which entries it adds depends on the input",
    Prefix: "it comes before the sequence",
    Prompt: "it comes before the sequence",
    Invocation: "it lets the adapter act on a part of the sequence only",
}


def check_mergeable(adapter: Adapter) -> None:
    """Raises InvalidAdapterError for kinds that no weight amounts to, by name."""
    for module, deltas in adapter.modules.items():
        for delta in deltas:
            for kind, why in _UNMERGEABLE.items():
                if isinstance(delta, kind):
                    raise InvalidAdapterError(
                        f"The adapter has a delta of kind {delta.kind} (of {module!r}), which no "
                        f"weight amounts to, because {why}: serve the adapter as it is."
                    )


def linear_weight(layout: BaseLayout, module: str) -> Tensor:
    """The base's weight, `[out, in]` float32, of a module in `BaseLayout.target_shapes`."""
    weight = layout.weight(module)
    return weight.T if module == EMBEDDING else weight


class MergedModel:
    """All weights of a base model, by Hugging Face names, merged one after the other."""

    def __init__(self, adapter: Adapter, layout: BaseLayout) -> None:
        """layout: with weights. Raises InvalidAdapterError for an adapter that cannot be merged."""
        check_mergeable(adapter)
        self._deltas = adapter.modules
        self.layout = layout
        # Whether the head is the embedding still.
        self.tied = layout.tied and self._alike_at_both_ends()
        # Modules that have a bias: those of the base, and those that the adapter gives one.
        self.biased = layout.biased_modules | {
            module
            for module, deltas in adapter.modules.items()
            if module != EMBEDDING and any(isinstance(delta, Bias) for delta in deltas)
        }

    def __len__(self) -> int:
        """How many tensors there are."""
        layers = len(self.layout.module_shapes) + len(self.layout.norm_sizes)
        return layers + len(self.biased) + (1 if self.tied else 2)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and numbers, float32: of the embedding and the head, then of linear layers, then of
        norms."""
        for module in (EMBEDDING,) if self.tied else (EMBEDDING, HEAD):
            yield from self._merged(module)
        for module in self.layout.module_shapes:
            yield from self._merged(module)
        for module in self.layout.norm_sizes:
            weight = self.layout.weight(module)
            for delta in self._deltas.get(module, ()):
                if isinstance(delta, NormWeight):
                    weight = delta.weight
            yield f"{module}.weight", weight

    def _merged(self, module: str) -> Iterator[tuple[str, Tensor]]:
        deltas = self._deltas.get(module, ())
        rows = [delta for delta in deltas if isinstance(delta, TokenRows)]
        others = [delta for delta in deltas if not isinstance(delta, TokenRows)]
        # Replaced first: other deltas are changes of what the rows are then.
        weight = _with_rows(self.layout.weight(module), rows)
        if module == EMBEDDING:
            yield f"{module}.weight", _merged_embedding(weight, others)
            return
        weight, bias = merge_into(weight, self.layout.bias(module), others)
        yield f"{module}.weight", weight
        if bias is not None:
            yield f"{module}.bias", bias

    def _alike_at_both_ends(self) -> bool:
        """Whether the adapter does to the head what it does to the embedding."""
        embedding, head = self._deltas.get(EMBEDDING, ()), self._deltas.get(HEAD, ())
        return len(embedding) == len(head) and all(map(_same_rows, embedding, head))


def _merged_embedding(weight: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """weight: [vocab, hidden]. A bias goes into every row."""
    merged, bias = merge_into(weight.T, None, deltas)
    return merged.T if bias is None else merged.T + bias


def _with_rows(weight: Tensor, replaced: Sequence[TokenRows]) -> Tensor:
    """weight: [vocab, hidden]."""
    for delta in replaced:
        weight = weight.index_copy(0, delta.ids, delta.rows)
    return weight


def _same_rows(one: Delta, other: Delta) -> bool:
    return (
        isinstance(one, TokenRows)
        and isinstance(other, TokenRows)
        and torch.equal(one.ids, other.ids)
        and torch.equal(one.rows, other.rows)
    )
