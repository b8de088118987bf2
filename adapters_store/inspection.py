"""What an adapter's folder holds and what would refuse it, as data for the command line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.files import folder_digest, read_config_bytes, read_shapes
from polydelta.adapters_store.formats.modules import outline_adapter
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import parse_config
from polydelta.adapters_store.formats.quantized import plain_shapes
from polydelta.adapters_store.formats.registry import format_of
from polydelta.adapters_store.formats.servable import check_served
from polydelta.adapters_store.reference import AdapterRef, signature


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter at a glance. What could not be found out because of `problem` is empty or 0."""

    id: str
    path: Path
    # "LORA", "SHIRA"
    format: str
    kinds: tuple[str, ...]
    # Those that occur, ascending; empty when no delta has a rank.
    ranks: tuple[int, ...]
    # Last part of the module's path -> how many modules, e.g. {"q_proj": 30}.
    modules_by_name: Mapping[str, int]
    # Of the config and the weights on disk.
    bytes: int
    # What would refuse the adapter.
    problem: str | None

    @property
    def modules(self) -> int:
        """How many modules it changes."""
        return sum(self.modules_by_name.values())

    @cached_property
    def digest(self) -> str:
        """As in `Adapter.digest`; empty when files are missing. Reads all of them, when asked."""
        try:
            return folder_digest(self.path)
        except InvalidAdapterError:
            return ""


def inspect(path: Path, layout: BaseLayout | None = None) -> AdapterSummary:
    """Looks into an adapter's folder. Raises nothing for a bad one: the summary has the problem.

    Without a layout only the config and the tensors' headers are read, and only what is wrong over
    any base is found. With one, the adapter is read as for serving.
    """
    adapter_id, name, problem = path.absolute().name, "", None
    modules: dict[str, ModuleOutline] = {}
    try:
        config = parse_config(read_config_bytes(path))
        # Known even where the outline raises.
        name, _ = format_of(config)
        _, modules = outline_adapter(*plain_shapes(config, read_shapes(path)))
        check_served(name, (kind for module in modules.values() for kind in module.kinds))
        if layout is not None:
            read_adapter(AdapterRef(adapter_id, 1, path), layout)
    except InvalidAdapterError as error:
        problem = str(error)
    return AdapterSummary(
        id=adapter_id,
        path=path,
        format=name,
        kinds=tuple(sorted({kind for module in modules.values() for kind in module.kinds})),
        ranks=tuple(sorted({module.rank for module in modules.values()} - {0})),
        modules_by_name=Counter(module.rpartition(".")[2] for module in sorted(modules)),
        bytes=sum(file[1] for file in signature(path) if file is not None),
        problem=problem,
    )
