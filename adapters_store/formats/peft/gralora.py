"""PEFT's GraLoRA (arXiv:2505.20355): the weight is cut into k x k blocks, each with a LoRA of rank
r / k, and `hybrid_r` adds an ordinary LoRA.

The inputs of block n have r numbers in common, of which the outputs of block j take the j-th r / k:
as one LoRA it has rank k r, with zeros in A outside of block n, and in B outside of block j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import (
    MODULE_CHOICE,
    linear_layers,
    refuse_surplus,
)
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_A, _B = "gralora_A", "gralora_B"
_HYBRID_A, _HYBRID_B = "gralora_A_general.weight", "gralora_B_general.weight"


@dataclass(frozen=True)
class _Settings:
    rank: int
    # Of the ordinary LoRA; 0 without one.
    hybrid_rank: int
    blocks: int
    scale: float


def _settings(config: Config) -> _Settings:
    rank, blocks = (positive_int(key, config.get(key)) for key in ("r", "gralora_k"))
    hybrid = config.get("hybrid_r", 0)
    hybrid_rank = 0 if hybrid == 0 else positive_int("hybrid_r", hybrid)
    if rank % blocks:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: gralora_k is {blocks}, which does not divide r = {rank}."
        )
    scale = number("alpha", config.get("alpha")) / (rank + hybrid_rank)
    return _Settings(rank, hybrid_rank, blocks, scale)


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank, hybrid_rank, blocks = settings.rank, settings.hybrid_rank, settings.blocks
    why = f"r and gralora_k in {CONFIG_FILE}"
    shapes.check(_A, (blocks, *shapes[_A][1:2], rank), why)
    shapes.check(_B, (blocks, rank, *shapes[_B][2:3]), why)
    if hybrid_rank:
        why = f"hybrid_r = {hybrid_rank} in {CONFIG_FILE}"
        shapes.need(_HYBRID_A, _HYBRID_B)
        shapes.check(_HYBRID_A, (hybrid_rank, *shapes[_HYBRID_A][1:2]), why)
        shapes.check(_HYBRID_B, (*shapes[_HYBRID_B][:1], hybrid_rank), why)
    else:
        for parameter in (_HYBRID_A, _HYBRID_B):
            refuse_surplus(shapes, parameter, "hybrid_r is 0")
    return ModuleOutline(LowRank.kind, blocks * rank + hybrid_rank)


def _read(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    rank, hybrid_rank, blocks = settings.rank, settings.hybrid_rank, settings.blocks
    out, in_ = tensors.out_features, tensors.in_features
    if out % blocks or in_ % blocks:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: gralora_k is {blocks}, which does not divide the base model's layer "
            f"{tensors.module!r} of shape {[out, in_]}: load the adapter over the base that it was "
            "trained on."
        )
    tensors.check(_A, (blocks, in_ // blocks, rank))
    tensors.check(_B, (blocks, rank, out // blocks))
    a = torch.block_diag(*tensors[_A].transpose(1, 2))
    b = _spread(tensors[_B])
    if hybrid_rank:
        tensors.check(_HYBRID_A, (hybrid_rank, in_))
        tensors.check(_HYBRID_B, (out, hybrid_rank))
        a, b = torch.cat((a, tensors[_HYBRID_A])), torch.cat((b, tensors[_HYBRID_B]), 1)
    return (LowRank(a, b * settings.scale),)


def _spread(b: Tensor) -> Tensor:
    """[j, (n, s), out / k] -> [(j, out / k), (n, j, s)], s counting r / k numbers."""
    blocks, rank, size = b.shape
    # [j, out / k, n, j', s]: zero but where j' is j
    spread = torch.zeros(blocks, size, blocks, blocks, rank // blocks)
    by_block = b.view(blocks, blocks, rank // blocks, size).permute(0, 3, 1, 2)
    for block in range(blocks):
        spread[block, :, :, block] = by_block[block]
    return spread.view(blocks * size, blocks * rank)


FORMAT = PeftFormat(
    rules=KeyRules(
        honoured=frozenset({"alpha", "gralora_k", "hybrid_r", "r"}),
        # Biases that were trained are read with the saved modules.
        harmless=COMMON_HARMLESS | MODULE_CHOICE | {"bias", "gralora_dropout", "init_weights"},
        refused=COMMON_REFUSED,
    ),
    parameters=Parameters((_A, _B), (_HYBRID_A, _HYBRID_B)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
