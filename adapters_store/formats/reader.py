"""From an adapter's folder to an `Adapter`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import (
    content_digest,
    parse_weights,
    read_config_bytes,
    read_weights_bytes,
)
from polydelta.adapters_store.formats.modules import read_modules
from polydelta.adapters_store.formats.peft_config import Config, parse_config
from polydelta.adapters_store.formats.quantized import dequantised
from polydelta.adapters_store.formats.registry import format_of
from polydelta.adapters_store.reference import AdapterRef, signature

# Numbers in a quantised adapter for each one in the base: above that it is no adapter of this base.
_MOST = 4


def read_adapter(ref: AdapterRef, layout: BaseLayout) -> Adapter:
    """Reads and checks an adapter against the base that it is to run on.

    Raises InvalidAdapterError; its message is fit for clients.
    """
    before = signature(ref.path) if ref.signature is None else ref.signature
    config_bytes = read_config_bytes(ref.path)
    config: Config = parse_config(config_bytes)
    name, parser = format_of(config)
    weights_bytes = read_weights_bytes(ref.path)
    # Otherwise an old config might be paired with new weights, or new files be served as an old
    # version, beside KV that the old ones made.
    if signature(ref.path) != before:
        raise InvalidAdapterError(
            f"The files of adapter {ref.name!r} have changed since it was asked for: ask again for "
            f"{ref.id!r}."
        )
    digest = content_digest(config_bytes, weights_bytes)
    if ref.digest not in (None, digest):
        raise InvalidAdapterError(
            f"The files of adapter {ref.name!r} are not those that were uploaded: the disk has "
            "damaged them; upload them again."
        )
    tensors: Mapping[str, Tensor] = parse_weights(weights_bytes)
    # The tensors have memory of their own.
    del weights_bytes
    limit = _MOST * sum(map(math.prod, layout.target_shapes.values()))
    config, tensors = dequantised(config, tensors, limit)
    modules = read_modules(parser, config, tensors, layout)
    return Adapter(ref.id, ref.version, digest, name, modules)
