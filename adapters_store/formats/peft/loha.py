"""PEFT's LoHa (arXiv:2108.06098): `dW = alpha / r * (U1 V1) * (U2 V2)`, the product of two low-rank
matrices entry by entry.

It is of rank r**2: each column of U1 times each of U2, and each row of V1 times each of V2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
    mapping,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import MODULE_CHOICE, linear_layers
from polydelta.adapters_store.formats.peft_patterns import PatternTable
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_U1, _V1, _U2, _V2 = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"


@dataclass(frozen=True)
class _Settings:
    ranks: PatternTable[int]
    alphas: PatternTable[float]


def _settings(config: Config) -> _Settings:
    ranks = mapping("rank_pattern", config.get("rank_pattern"))
    alphas = mapping("alpha_pattern", config.get("alpha_pattern"))
    return _Settings(
        PatternTable("rank_pattern", ranks, positive_int("r", config.get("r")), positive_int),
        PatternTable("alpha_pattern", alphas, number("alpha", config.get("alpha")), number),
    )


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank = settings.ranks[shapes.module]
    why = f"rank {rank} (r and rank_pattern in {CONFIG_FILE})"
    for u in (_U1, _U2):
        shapes.check(u, (*shapes[u][:1], rank), why)
    for v in (_V1, _V2):
        shapes.check(v, (rank, *shapes[v][1:2]), why)
    return ModuleOutline(LowRank.kind, rank**2)


def _read(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    rank = tensors.shapes[_V1][0]
    for u, v in ((_U1, _V1), (_U2, _V2)):
        tensors.check(u, (tensors.out_features, rank))
        tensors.check(v, (rank, tensors.in_features))
    scale = settings.alphas[tensors.module] / rank
    a = _row_products(tensors[_V1], tensors[_V2])
    b = _row_products(tensors[_U1].T, tensors[_U2].T * scale).T
    return (LowRank(a, b.contiguous()),)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Two of [r, n] -> [r**2, n]: each row of one times each row of the other."""
    return (left.unsqueeze(1) * right).flatten(0, 1)


FORMAT = PeftFormat(
    rules=KeyRules(
        honoured=frozenset({"alpha", "alpha_pattern", "r", "rank_pattern"}),
        harmless=COMMON_HARMLESS
        | MODULE_CHOICE
        | {
            "init_weights",
            "module_dropout",
            "rank_dropout",
            # Of convolutions; the base has none.
            "use_effective_conv2d",
        },
        refused=COMMON_REFUSED,
    ),
    parameters=Parameters((_U1, _V1, _U2, _V2)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
