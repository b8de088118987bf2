"""What PEFT's prompt-learning formats have in common: tensors without a module's path, and virtual
tokens, as many as the config says, before every sequence."""

from __future__ import annotations

import reprlib
from collections.abc import Collection

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_config import Config, positive_int
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

EMBEDDINGS = "prompt_embeddings"

HONOURED = frozenset({"num_transformer_submodules", "num_virtual_tokens", "token_dim"})


def num_virtual_tokens(config: Config) -> int:
    """Raises InvalidAdapterError when it is no number above 0, and for encoder-decoder models."""
    submodules = config.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: num_transformer_submodules is {reprlib.repr(submodules)}, as models "
            "with an encoder and a decoder have it: train with task_type='CAUSAL_LM'."
        )
    return positive_int("num_virtual_tokens", config.get("num_virtual_tokens"))


def check_names(names: Collection[str], expected: Collection[str]) -> None:
    """Raises InvalidAdapterError unless the file has these tensors and no others."""
    for name in names:
        if name not in expected:
            raise InvalidAdapterError(
                f"Tensor {name[:200]!r} cannot be served; this format has "
                f"{', '.join(expected)}: save the adapter again with these alone."
            )
    for name in expected:
        if name not in names:
            raise InvalidAdapterError(
                f"{WEIGHTS_FILE} has no {name}: save the adapter again from the trained model."
            )


def check_size(field: str, value: int, of_base: int) -> None:
    """Raises InvalidAdapterError when a size in the config is not the base model's."""
    if value != of_base:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} is {value}, but the base model has {of_base}: load the "
            "adapter over the base that it was trained on."
        )
