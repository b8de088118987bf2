"""PEFT's GraLoRA (arXiv:2505.20355): the weight is cut into k x k blocks, each with a LoRA of rank
r / k, and `hybrid_r` adds an ordinary LoRA.

The inputs of block n have r numbers in common, of which the outputs of block j take the j-th r / k:
as one LoRA it has rank k r, with zeros in A outside of block n, and in B outside of block j. Where
that is more than the layer's smaller side, the blocks of the change itself are made instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules, number, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, refuse_surplus
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.formats.ranks import low_rank_of
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
        shapes.check_factors(_HYBRID_A, _HYBRID_B, hybrid_rank, why)
    else:
        for parameter in (_HYBRID_A, _HYBRID_B):
            refuse_surplus(shapes, parameter, "hybrid_r is 0")
    sides = (blocks * size for size in (*shapes[_A][1:2], *shapes[_B][2:3]))
    return ModuleOutline(LowRank.kind, min(blocks * rank + hybrid_rank, *sides))


def _read(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    rank, hybrid_rank, blocks = settings.rank, settings.hybrid_rank, settings.blocks
    out, in_ = tensors.out_features, tensors.in_features
    tensors.check_divides("gralora_k", blocks)
    tensors.check(_A, (blocks, in_ // blocks, rank))
    tensors.check(_B, (blocks, rank, out // blocks))
    if hybrid_rank:
        tensors.check_factors(_HYBRID_A, _HYBRID_B, hybrid_rank)
    if blocks * rank + hybrid_rank > min(out, in_):
        change = _change(tensors[_A], tensors[_B])
        if hybrid_rank:
            change += tensors[_HYBRID_B] @ tensors[_HYBRID_A]
        return (low_rank_of(change * settings.scale),)
    a = torch.block_diag(*tensors[_A].transpose(1, 2))
    b = _spread(tensors[_B])
    if hybrid_rank:
        a, b = torch.cat((a, tensors[_HYBRID_A])), torch.cat((b, tensors[_HYBRID_B]), 1)
    return (LowRank(a, b * settings.scale),)


def _change(a: Tensor, b: Tensor) -> Tensor:
    """[n, in / k, (j, s)] and [j, (n, s), out / k] -> [out, in]."""
    blocks = len(a)
    change = torch.einsum(
        "ndjs,jnso->jond", a.unflatten(2, (blocks, -1)), b.unflatten(1, (blocks, -1))
    )
    return change.flatten(2).flatten(0, 1)


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
    rules=key_rules(
        honoured={"alpha", "gralora_k", "hybrid_r", "r"},
        harmless={"gralora_dropout", "init_weights"},
    ),
    parameters=Parameters((_A, _B), (_HYBRID_A, _HYBRID_B)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
