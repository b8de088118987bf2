"""The formats that are read. A new one is a parser module and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import peft_lora, peft_shira
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config
from polydelta.adapters_store.reference import CONFIG_FILE


class Format(Protocol):
    """A parser module. Both functions raise InvalidAdapterError for what cannot be served."""

    def outline(self, config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        """Full module path -> what it gets, without reading numbers or knowing the base."""
        ...

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
    ) -> dict[str, tuple[Delta, ...]]:
        """Full module path -> its deltas, in float32, checked against the base."""
        ...


# By `peft_type` in the config.
FORMATS: Mapping[str, Format] = {"LORA": peft_lora, "SHIRA": peft_shira}


def format_of(config: Config) -> tuple[str, Format]:
    """The format's name and parser. Raises InvalidAdapterError for one that is not read."""
    name = config.get("peft_type")
    if not isinstance(name, str) or name not in FORMATS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: peft_type is {str(name)[:80]!r}, which is not served yet: "
            f"use one of {', '.join(FORMATS)}."
        )
    return name, FORMATS[name]
