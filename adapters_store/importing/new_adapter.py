"""An adapter that is about to get a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.adapter_folder import write_folder

_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class NewAdapter:
    """What its files are to say."""

    # As in the config's `peft_type`.
    format: str
    # Full module path -> parameter of the format -> tensor.
    modules: Mapping[str, Mapping[str, Tensor]]
    # Full path of a norm, of the embedding or of the head -> its whole new weight.
    replaced: Mapping[str, Tensor]
    # Whether an embedding among them is the head too; only over a base where they are one.
    tied: bool = False

    def write(self, folder: Path, base_name: str) -> None:
        """base_name: what the config says of the base, a folder or a hub id.

        Raises InvalidAdapterError when there is no change, StoreError when the folder is taken or
        cannot be written.
        """
        if not self.modules and not self.replaced:
            raise InvalidAdapterError(
                "It has the base model's own weights, so an adapter would change nothing: check "
                "that both names are right."
            )
        tensors = {
            f"{_PREFIX}{module}.{parameter}": tensor
            for module, of_module in self.modules.items()
            for parameter, tensor in of_module.items()
        }
        tensors |= {f"{_PREFIX}{module}.weight": weight for module, weight in self.replaced.items()}
        # A tied embedding that is not listed is taken for the head too.
        own = [module for module in self.replaced if not (self.tied and module == EMBEDDING)]
        config = {
            "peft_type": self.format,
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "modules_to_save": sorted(own) or None,
            "target_modules": sorted(self.modules),
            "task_type": "CAUSAL_LM",
        }
        write_folder(folder, config, tensors)
