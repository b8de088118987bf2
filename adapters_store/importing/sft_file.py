"""The file that composable sparse fine-tuning (arXiv:2110.07560) saves, with the code of
cambridgeltl/composable-sft: a pickle of sparse changes, and of whole tensors for what was tuned in
full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.foreign import sft
from polydelta.adapters_store.importing.new_adapter import NewAdapter
from polydelta.adapters_store.importing.pickle_file import load_pickle

SFT_FILE = "pytorch_diff.bin"


def import_sft(path: Path, base: BaseLayout) -> NewAdapter:
    """The file's changes, bit for bit; what changes norms, embedding and head is made a whole
    weight.

    path: the file, or the folder that it is in. base: with its weights. Raises InvalidAdapterError
    for a file that is no such one, or of another base.
    """
    path = path / SFT_FILE if path.is_dir() else path
    diffs, whole = _content(path)
    modules: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, encoded in diffs.items():
        module, _, parameter = name.rpartition(".")
        size = _size(base, name)
        indices, values = _decoded(name, encoded, size)
        if not len(values):
            continue
        if parameter == "weight" and module in base.module_shapes:
            entries = {sft.INDICES: indices.int(), sft.VALUES: values}
            modules.setdefault(module, {}).update(entries)
            continue
        change = torch.zeros(size).index_put_(tuple(indices), values.float())
        if parameter == "bias":
            modules.setdefault(module, {})[sft.BIAS] = change
        else:
            replaced[module] = base.weight(module) + change
    for name, tensor in whole.items():
        module, _, parameter = name.rpartition(".")
        _check_size(name, tuple(tensor.shape), _size(base, name))
        before = base.bias(module)
        if parameter == "bias" and before is not None:
            modules.setdefault(module, {})[sft.BIAS] = tensor.detach().float() - before
        elif module in base.module_shapes:
            raise InvalidAdapterError(
                f"{path.name} has {name!r} as a whole: only biases, norms, embedding and head are "
                "taken whole; apply it to the base, and make an adapter of the model with "
                "`polydelta adapters distill-delta`."
            )
        else:
            replaced[module] = tensor.detach()
    return NewAdapter("SFT", modules, replaced, base.tied)


def _content(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Sparse changes and whole tensors, by parameter name."""
    content: Any = load_pickle(path)
    known = {"diffs", "abs"}
    if isinstance(content, dict) and content.keys() and content.keys() <= known:
        diffs, whole = content.get("diffs") or {}, content.get("abs") or {}
        if (
            isinstance(diffs, dict)
            and isinstance(whole, dict)
            and all(isinstance(tensor, Tensor) for tensor in whole.values())
        ):
            return diffs, whole
    raise InvalidAdapterError(
        f"{path.name} holds something else than {' and '.join(sorted(known))}: give the {SFT_FILE} "
        "that composable-sft's `SFT.save` has written."
    )


def _decoded(name: str, encoded: Any, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """[dimensions, nnz] int64 indices, and [nnz] values.

    Places are counted with the first dimension running fastest, and kept as steps from one to the
    next.
    """
    try:
        _check_size(name, tuple(int(length) for length in encoded["size"]), size)
        steps = torch.tensor([int(step) for step in encoded["index_steps"]], dtype=torch.int64)
        values: Tensor = encoded["values"].detach()
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _unsound(name) from None
    places = steps.cumsum(0)
    if values.shape != places.shape or (steps[1:] < 1).any():
        raise _unsound(name)
    if len(places) and not 0 <= places[0] <= places[-1] < math.prod(size):
        raise _unsound(name)
    indices: list[Tensor] = []
    for length in size:
        indices.append(places % length)
        places = places // length
    return torch.stack(indices), values


def _unsound(name: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"The change of {name!r} is not kept as size, index_steps and values that fit: save it "
        "again with composable-sft's `SFT.save`."
    )


def _size(base: BaseLayout, name: str) -> tuple[int, ...]:
    """Of a parameter of the base. Raises InvalidAdapterError when it has none of this name."""
    module, _, parameter = name.rpartition(".")
    if parameter == "bias" and module in base.biased_modules:
        return base.module_shapes[module][:1]
    if parameter == "weight":
        if module in base.module_shapes:
            return base.module_shapes[module]
        if module in base.norm_sizes:
            return (base.norm_sizes[module],)
        # A tied head is no parameter of its own.
        if module == EMBEDDING or (module == HEAD and not base.tied):
            return (base.vocab_size, base.hidden_size)
    raise InvalidAdapterError(
        f"The file changes {name[:200]!r}, which the base model has not: give the base that it was "
        "made for."
    )


def _check_size(name: str, size: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if size != expected:
        raise InvalidAdapterError(
            f"The file's {name!r} has shape {list(size)}, but the base model's has "
            f"{list(expected)}: give the base that it was made for."
        )
