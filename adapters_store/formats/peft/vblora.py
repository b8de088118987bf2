"""PEFT's VB-LoRA (arXiv:2405.15179): a LoRA whose A and B consist of pieces of `vector_length`
numbers, each a mixture of `topk` vectors of a bank that all modules share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, flag, key_rules, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, refuse_surplus
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_BANK = "base_model.vblora_vector_bank"
_LOGITS_A, _LOGITS_B = "vblora_logits_A", "vblora_logits_B"
_LOGITS = (_LOGITS_A, _LOGITS_B)
# In place of the logits, with `save_only_topk_weights`; all weights but the last are saved.
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_CHOSEN = tuple(logits + part for logits in _LOGITS for part in (_INDICES, _WEIGHTS))


@dataclass(frozen=True)
class _Settings:
    rank: int
    num_vectors: int
    vector_length: int
    topk: int
    # Whether the file says which vectors are mixed, instead of the logits of all.
    chosen: bool


def _settings(config: Config) -> _Settings:
    rank, num_vectors, vector_length, topk = (
        positive_int(key, config.get(key)) for key in ("r", "num_vectors", "vector_length", "topk")
    )
    if topk > num_vectors:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: topk is {topk}, but there are only {num_vectors} vectors "
            "(num_vectors)."
        )
    chosen = flag("save_only_topk_weights", config.get("save_only_topk_weights"))
    return _Settings(rank, num_vectors, vector_length, topk, chosen)


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank, topk = settings.rank, settings.topk
    shapes.need(_BANK, *(_CHOSEN if settings.chosen else _LOGITS))
    for parameter in _LOGITS if settings.chosen else _CHOSEN:
        state = str(settings.chosen).lower()
        refuse_surplus(shapes, parameter, f"save_only_topk_weights is {state}")
    why = f"r, topk, num_vectors and vector_length in {CONFIG_FILE}"
    shapes.check(_BANK, (settings.num_vectors, settings.vector_length), why)
    sizes = {_INDICES: topk, _WEIGHTS: topk - 1} if settings.chosen else {"": settings.num_vectors}
    first = next(iter(sizes))
    pieces_a, pieces_b = shapes[_LOGITS_A + first][1:2], shapes[_LOGITS_B + first][:1]
    for part, size in sizes.items():
        shapes.check(_LOGITS_A + part, (rank, *pieces_a, size), why)
        shapes.check(_LOGITS_B + part, (*pieces_b, rank, size), why)
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    part = _INDICES if settings.chosen else ""
    pieces, length = tensors.shapes, settings.vector_length
    tensors.check_change(
        (pieces[_LOGITS_B + part][0] * length, pieces[_LOGITS_A + part][1] * length)
    )
    # [rank, in / length, length] and [out / length, rank, length]
    a, b = (_mixtures(settings, tensors, logits) for logits in _LOGITS)
    return (LowRank(a.flatten(1), b.transpose(1, 2).flatten(0, 1)),)


def _mixtures(settings: _Settings, tensors: ModuleTensors, logits: str) -> Tensor:
    if settings.chosen:
        indices = tensors.indices(logits + _INDICES, settings.num_vectors)
        weights = tensors[logits + _WEIGHTS]
        weights = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), -1)
    else:
        top = tensors[logits].topk(settings.topk)
        indices, weights = top.indices, top.values.softmax(-1)
    # Without the vectors of all pieces side by side, which are topk times as many numbers.
    mixtures = embedding_bag(
        indices.flatten(0, 1),
        tensors[_BANK],
        mode="sum",
        per_sample_weights=weights.flatten(0, 1),
    )
    return mixtures.view(*indices.shape[:2], -1)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"num_vectors", "r", "save_only_topk_weights", "topk", "vector_length"},
        harmless={"init_logits_std", "init_vector_bank_bound", "vblora_dropout"},
    ),
    parameters=Parameters((), (*_LOGITS, *_CHOSEN), (_BANK,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
