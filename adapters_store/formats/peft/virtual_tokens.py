"""What PEFT's prompt-learning formats have in common: tensors without a module's path, and virtual
tokens, as many as the config says, before every sequence."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Delta, Prefix, Prompt
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, KeyRules, positive_int
from polydelta.adapters_store.formats.peft_tensors import check_finite, check_shape
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

EMBEDDINGS = "prompt_embeddings"

HONOURED = frozenset({"num_transformer_submodules", "num_virtual_tokens", "token_dim"})


@dataclass(frozen=True)
class VirtualTokenFormat:
    """A parser, made of what is particular to its format."""

    rules: KeyRules
    # Of what it gives.
    kind: str
    # The sizes in the config, as they are named when a tensor has others.
    sizes: str
    # Name of each of the file's tensors -> its shape, from the config. Raises InvalidAdapterError.
    shapes: Callable[[Config], Mapping[str, Shape]]
    # From the tensors in float32, over the base. Raises InvalidAdapterError.
    read_tokens: Callable[[Config, Mapping[str, Tensor], BaseLayout], Prefix | Prompt]

    def outline(self, config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        self.rules.check(config)
        expected = self.shapes(config)
        _check_names(shapes, expected)
        for name, shape in expected.items():
            check_shape(name, shapes[name], shape, f"{self.sizes} in {CONFIG_FILE}")
        return {MODEL: ModuleOutline(self.kind, 0)}

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
    ) -> dict[str, tuple[Delta, ...]]:
        self.outline(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        values = {name: to_float32(name, tensor) for name, tensor in tensors.items()}
        tokens = self.read_tokens(config, values, layout)
        check_finite(MODEL, (tokens,))
        return {MODEL: (tokens,)}


def num_virtual_tokens(config: Config) -> int:
    """Raises InvalidAdapterError when it is no number above 0, and for encoder-decoder models."""
    submodules = config.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: num_transformer_submodules is {reprlib.repr(submodules)}, as models "
            "with an encoder and a decoder have it: train with task_type='CAUSAL_LM'."
        )
    return positive_int("num_virtual_tokens", config.get("num_virtual_tokens"))


def check_size(field: str, value: int, of_base: int) -> None:
    """Raises InvalidAdapterError when a size in the config is not the base model's."""
    if value != of_base:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} is {value}, but the base model has {of_base}: load the "
            "adapter over the base that it was trained on."
        )


def _check_names(names: Collection[str], expected: Collection[str]) -> None:
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
