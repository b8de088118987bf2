"""What the files of a staged adapter say of it, for the catalog's record, before its numbers are
read."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError, TooLargeError
from polydelta.adapters_store.formats.files import read_config_bytes, read_shapes
from polydelta.adapters_store.formats.modules import outline_adapter
from polydelta.adapters_store.formats.peft_config import parse_config
from polydelta.adapters_store.formats.quantized import plain_shapes
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.records import AdapterFacts
from polydelta.adapters_store.upload.limits import UploadLimits

# Numbers that a row takes in the pool, however short it is.
_LEAST_ROW = 32


def check_outline(folder: Path, limits: UploadLimits) -> AdapterFacts:
    """From the config and the tensors' header alone, so whatever the base.

    Raises InvalidAdapterError for what no base could serve, and for a rank beyond the limits.
    """
    summary = inspect(folder)
    if summary.problem is not None:
        raise InvalidAdapterError(summary.problem)
    rank = max(summary.ranks, default=0)
    if rank > limits.max_rank:
        raise InvalidAdapterError(
            f"The adapter has rank {rank}, but this server takes ranks up to {limits.max_rank}: "
            "train with a smaller r, or shrink the adapter by a singular value decomposition."
        )
    return AdapterFacts(
        summary.format, summary.kinds, rank, modules=summary.modules, nbytes=summary.bytes
    )


def check_growth(folder: Path, layout: BaseLayout, limits: UploadLimits) -> None:
    """A file may have a bit for each of the adapter's numbers, or a seed for all of them: what it
    becomes may be no more than what the largest file holds in 16 bits.

    The adapter is known to have passed `check_outline`. Raises TooLargeError.
    """
    config, shapes = plain_shapes(parse_config(read_config_bytes(folder)), read_shapes(folder))
    stored = sum(math.prod(shape[:-1]) * max(_LEAST_ROW, *shape[-1:]) for shape in shapes.values())
    _, modules = outline_adapter(config, shapes)
    sizes = _sizes(layout)
    made = sum(module.rank * sizes[name] + module.numbers for name, module in modules.items())
    numbers = max(stored, made)
    most = limits.max_file_bytes // 2
    if numbers > most:
        raise TooLargeError(
            f"The adapter becomes {numbers} numbers when it is read, and this server takes up to "
            f"{most}: train with a smaller r, or on fewer modules."
        )


def _sizes(layout: BaseLayout) -> Counter[str]:
    """Inputs and outputs, by the ends of modules' paths: an outline may know no more of them."""
    sizes: Counter[str] = Counter()
    for module, shape in layout.target_shapes.items():
        while module:
            sizes[module] += sum(shape)
            module = module.partition(".")[2]
    return sizes
