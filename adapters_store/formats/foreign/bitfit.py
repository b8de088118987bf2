"""BitFit (arXiv:2106.10199): the base's biases are trained, and nothing else.

The file has the new biases under the base's own names, and these are read for every format (see
`saved_modules.py`): this one is for files that have nothing besides.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules

KEY_RULES = key_rules()


def outline(config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """Nothing of its own. Raises InvalidAdapterError for a tensor that is left."""
    KEY_RULES.check(config)
    for name in shapes:
        raise InvalidAdapterError(
            f"Tensor {name[:200]!r} cannot be served; BitFit trains biases alone, named "
            "base_model.model.<module>.bias: leave it out, or name the method that it belongs to "
            "in peft_type."
        )
    return {}


def read(
    config: Config,
    tensors: Mapping[str, Tensor],
    layout: BaseLayout,  # noqa: ARG001 - the biases are not read here
) -> dict[str, tuple[Delta, ...]]:
    """Nothing of its own. Raises InvalidAdapterError for a tensor that is left."""
    outline(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return {}
