"""A fine-tuned model of full size, beside its base."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError


def check_same_parts(base: BaseLayout, tuned: BaseLayout, cut_vocabulary: bool) -> None:
    """Raises InvalidAdapterError when no adapter over `base` can be `tuned`.

    cut_vocabulary: tokens of the tuned model that the base has not are no reason.
    """
    sizes = [
        (part.module_shapes, part.norm_sizes, part.biased_modules, part.head_dim)
        for part in (base, tuned)
    ]
    if sizes[0] != sizes[1]:
        raise InvalidAdapterError(
            f"The tuned model has {_described(tuned)}, the base has {_described(base)}: give the "
            "base that it was tuned from."
        )
    check_vocabulary(tuned.vocab_size, base.vocab_size, cut_vocabulary)


def check_vocabulary(tuned: int, base: int, cut: bool) -> None:
    """Sizes of vocabularies. Raises InvalidAdapterError unless the base has all that is tuned, or
    the rest is to be left out."""
    if tuned < base or (tuned > base and not cut):
        raise InvalidAdapterError(
            f"The tuned model has {tuned} tokens, the base has {base}: "
            + (
                "give the base that it was tuned from."
                if tuned < base
                else "what the base has not cannot be served; if nobody needs these tokens, as "
                "with padding, leave them out with --cut-vocabulary."
            )
        )


def replaced_modules(base: BaseLayout, tuned: BaseLayout, dtype: torch.dtype) -> dict[str, Tensor]:
    """Norms, embedding and head that differ from the base's: full path -> weight. Where both models
    are tied, the embedding stands for the head.

    Norms are in float32; embedding and head are in `dtype`, without tokens that the base has not.
    """
    replaced: dict[str, Tensor] = {}
    tokens = (EMBEDDING,) if base.tied and tuned.tied else (EMBEDDING, HEAD)
    for module in (*base.norm_sizes, *tokens):
        theirs = tuned.weight(module)[: base.norm_sizes.get(module, base.vocab_size)]
        if not torch.equal(theirs, base.weight(module)):
            kept = torch.float32 if module in base.norm_sizes else dtype
            # In memory of its own, though a tied embedding may be read twice.
            replaced[module] = theirs.to(kept, copy=True)
    return replaced


def num_weights(layout: BaseLayout) -> int:
    """How many numbers the model consists of; what is tied counts once."""
    linear = sum(rows * columns for rows, columns in layout.module_shapes.values())
    biases = sum(layout.module_shapes[module][0] for module in layout.biased_modules)
    embedding = layout.vocab_size * layout.hidden_size * (1 if layout.tied else 2)
    return linear + biases + embedding + sum(layout.norm_sizes.values())


def _described(layout: BaseLayout) -> str:
    shapes = layout.module_shapes
    biases = f"{len(layout.biased_modules)} biases" if layout.biased_modules else "no bias"
    return (
        f"{layout.num_layers} layers of width {layout.hidden_size}, {len(shapes)} linear layers "
        f"with {sum(rows * columns for rows, columns in shapes.values())} weights, and {biases}"
    )
