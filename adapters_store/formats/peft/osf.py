"""PEFT's OSF (arXiv:2504.07097): trained components in place of the smallest singular ones of W.

`dW = U diag(S) V - U' diag(S') V'`, where the latter are those components of W itself: of twice the
rank that was trained, which is that of the layer unless nearly all components were kept.
"""

from __future__ import annotations

import torch

from polydelta.adapters_store.delta import Dense, LowRank
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters

_U, _S, _V = (f"osf_svd_params.{factor}_low" for factor in "USV")


def _outline(_config: Config, shapes: ModuleShapes) -> ModuleOutline:
    outputs, rank = shapes.dimensions(_U, 2)
    _, inputs = shapes.dimensions(_V, 2)
    shapes.check(_S, (rank,), f"the rank of its {_U}")
    shapes.check(_V, (rank, inputs), f"the rank of its {_U}")
    if _is_cheap(outputs, inputs, rank):
        return ModuleOutline(LowRank.kind, 2 * rank)
    return ModuleOutline(Dense.kind, 0)


def _is_cheap(outputs: int, inputs: int, rank: int) -> bool:
    """Whether the two factors have fewer numbers than the layer."""
    return 2 * rank * (outputs + inputs) < outputs * inputs


def _read(_config: Config, module: ModuleTensors) -> tuple[LowRank | Dense]:
    outputs, inputs = module.out_features, module.in_features
    # A layer has no more components.
    rank = min(module.shapes[_U][1], outputs, inputs)
    module.check_factors(_V, _U, rank)
    u, s, v = torch.linalg.svd(module.weight(), full_matrices=False)
    kept = len(s) - rank
    a = torch.cat((module[_V], v[kept:]))
    b = torch.cat((module[_U] * module[_S], -u[:, kept:] * s[kept:]), 1)
    return (LowRank(a, b) if _is_cheap(outputs, inputs, rank) else Dense(b @ a),)


FORMAT = PeftFormat(
    rules=key_rules(
        # How many components were kept, the tensors say; PEFT itself ignores target_svd_config.
        harmless={"effective_rank", "init_weights", "rank_pattern", "target_svd_config"},
    ),
    parameters=Parameters(required=(_U, _S, _V)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
)
