"""Which adapters there are: folders under one or more roots, looked up by name when asked for.

Nothing is read at start, so ten thousand folders cost nothing until one of them is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polydelta.adapters_store.errors import InvalidAdapterError, UnknownAdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterRef:
    """One version of one adapter, named but not read. Equal refs are the same version."""

    id: str
    version: int
    path: Path = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.id}@{self.version}"


class AdapterCatalog:
    """..."""
