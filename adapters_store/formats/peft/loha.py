"""PEFT's LoHa (arXiv:2108.06098): `dW = alpha / r * (U1 V1) * (U2 V2)`, the product of two low-rank
matrices entry by entry.

It is of rank r**2: each column of U1 times each of U2, and each row of V1 times each of V2. Where
that is more than the layer's smaller side, the product itself is made instead.
"""

from __future__ import annotations

from torch import Tensor

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import Scales, linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.formats.ranks import low_rank_of
from polydelta.adapters_store.reference import CONFIG_FILE

_U1, _V1, _U2, _V2 = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"


def _outline(scales: Scales, shapes: ModuleShapes) -> ModuleOutline:
    rank = scales.ranks[shapes.module]
    why = f"rank {rank} (r and rank_pattern in {CONFIG_FILE})"
    for u, v in ((_U1, _V1), (_U2, _V2)):
        shapes.check_factors(v, u, rank, why)
    return ModuleOutline(LowRank.kind, min(rank**2, *shapes[_U1][:1], *shapes[_V1][1:2]))


def _read(scales: Scales, tensors: ModuleTensors) -> tuple[LowRank]:
    rank = tensors.shapes[_V1][0]
    for u, v in ((_U1, _V1), (_U2, _V2)):
        tensors.check_factors(v, u, rank)
    scale = scales[tensors.module]
    if rank**2 > min(tensors.out_features, tensors.in_features):
        change = (tensors[_U1] @ tensors[_V1]) * (tensors[_U2] @ (tensors[_V2] * scale))
        return (low_rank_of(change),)
    a = _row_products(tensors[_V1], tensors[_V2])
    b = _row_products(tensors[_U1].T, tensors[_U2].T * scale).T
    return (LowRank(a, b.contiguous()),)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Two of [r, n] -> [r**2, n]: each row of one times each row of the other."""
    return (left.unsqueeze(1) * right).flatten(0, 1)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"alpha", "alpha_pattern", "r", "rank_pattern"},
        harmless={
            "init_weights",
            "module_dropout",
            "rank_dropout",
            # Of convolutions; the base has none.
            "use_effective_conv2d",
        },
    ),
    parameters=Parameters((_U1, _V1, _U2, _V2)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=Scales.of,
)
