"""The base model that a command works over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from polydelta.adapters_store.reference import AdapterRef

if TYPE_CHECKING:
    from polydelta.adapters_store.base_layout import BaseLayout
    from polydelta.engine.models.checkpoint import Checkpoint


def open_base(model: str | None, dtype: str) -> tuple[Checkpoint, BaseLayout]:
    """A base, and its layout with the weights as they are in this dtype.

    model: None for the default, a path or a hub id; dtype: by torch's name. Raises ModelError.
    """
    # Here and not above: `polydelta --help` must not wait for torch.
    import torch

    from polydelta.engine.models.base_weights import checkpoint_layout
    from polydelta.engine.models.checkpoint import open_checkpoint

    base = open_checkpoint(model)
    return base, checkpoint_layout(base, getattr(torch, dtype))


def told_base(adapters: Iterable[AdapterRef]) -> str | None:
    """What the adapters' configs call their base, if all say the same: often a hub id, where we
    know only a folder. Raises InvalidAdapterError."""
    from polydelta.adapters_store.formats.files import read_config_bytes
    from polydelta.adapters_store.formats.peft_config import parse_config

    configs = [parse_config(read_config_bytes(ref.path)) for ref in adapters]
    names = {str(config.get("base_model_name_or_path") or "") for config in configs}
    return (names.pop() if len(names) == 1 else None) or None
