"""The file that BitDelta's own code saves (FasterDecoding/BitDelta): a pickle of signs, scales and
whole weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.foreign import bitdelta
from polydelta.adapters_store.importing.full_model import check_vocabulary
from polydelta.adapters_store.importing.new_adapter import NewAdapter
from polydelta.adapters_store.importing.pickle_file import load_pickle

_MASK, _COEFFICIENT, _WEIGHT = "mask", "coeff", "weight"


def import_bitdelta(path: Path, base: BaseLayout, cut_vocabulary: bool = False) -> NewAdapter:
    """Signs and scales as they are, and of norms, embedding and head what differs from the base's.

    base: with its weights. Raises InvalidAdapterError for a file that is no such one, or of another
    base.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    tensors = _tensors(path)
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        shape = base.module_shapes.get(module)
        if shape is not None and parameter in (_MASK, _COEFFICIENT):
            ours = modules.setdefault(module, {})
            if parameter == _MASK:
                ours[bitdelta.BITS] = _bits(name, tensor, shape)
            else:
                ours[bitdelta.SCALE] = tensor.float().reshape(-1)
        elif parameter == _WEIGHT and module in (EMBEDDING, HEAD):
            check_vocabulary(len(tensor), base.vocab_size, cut_vocabulary)
            _replace(replaced, base, module, tensor[: base.vocab_size])
        elif parameter == _WEIGHT and module in base.norm_sizes:
            _replace(replaced, base, module, tensor)
        else:
            raise InvalidAdapterError(
                f"{path.name} has {name[:200]!r}, which the base model has not or which is no part "
                "of a BitDelta: give the base that it was made for; with whole models, use "
                "`polydelta adapters distill-delta`."
            )
    for module, ours in modules.items():
        if ours.keys() != {bitdelta.BITS, bitdelta.SCALE} or ours[bitdelta.SCALE].shape != (1,):
            raise InvalidAdapterError(
                f"The file has no {_MASK} with one {_COEFFICIENT} for {module!r}: save it again "
                "with BitDelta's code."
            )
    # Of a tied model it has the one parameter that both are.
    tied = base.tied and f"{HEAD}.{_WEIGHT}" not in tensors
    return NewAdapter("BITDELTA", modules, replaced, tied)


def _tensors(path: Path) -> Mapping[str, Tensor]:
    """Names as the authors' code writes them: `model.layers.0.self_attn.q_proj.mask`."""
    content: Any = load_pickle(path)
    if isinstance(content, dict) and all(isinstance(item, Tensor) for item in content.values()):
        return {str(name): tensor.detach() for name, tensor in content.items()}
    raise InvalidAdapterError(
        f"{path.name} holds something else than tensors by name: give the diff.pt that BitDelta's "
        "code has saved."
    )


def _bits(name: str, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """mask: [in / 32, out] int32, its lowest bit first -> as in `OneBit.bits`."""
    expected = (shape[1] // 32, shape[0])
    if tuple(mask.shape) != expected or shape[1] % 32 or mask.dtype != torch.int32:
        raise InvalidAdapterError(
            f"The file's {name!r} is {mask.dtype} of shape {list(mask.shape)}, but the base's "
            f"layer asks for torch.int32 of shape {list(expected)}: give the base that it was made "
            "for."
        )
    # Little-endian, so the byte of the lowest bits is the first one.
    return torch.from_numpy(mask.T.contiguous().numpy().astype("<i4").view("u1"))


def _replace(replaced: dict[str, Tensor], base: BaseLayout, module: str, weight: Tensor) -> None:
    before = base.weight(module)
    if weight.shape != before.shape:
        raise InvalidAdapterError(
            f"The file's {module!r} has shape {list(weight.shape)}, but the base model's has "
            f"{list(before.shape)}: give the base that it was made for."
        )
    # The base is rounded to the file's type, in which it was tuned.
    if not torch.equal(weight, before.to(weight.dtype)):
        replaced[module] = weight
