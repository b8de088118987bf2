"""PEFT's DEFT: part of what the layer gives is taken out and replaced.

`W' = W - P K^T W + s P R`, where K is relu(P), or P made orthonormal takes the place of both P and
K (`decomposition_method`); s is alpha / r, or 1 without alpha. The change is `P (s R - K^T W)`, of
rank r. With `para` nothing is put in the place of what was taken out (PaRa, arXiv:2406.05641).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    Config,
    flag,
    key_rules,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, one_of, refuse_surplus
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_P, _R = "deft_P", "deft_R"


@dataclass(frozen=True)
class _Settings:
    rank: int
    # None: nothing is scaled.
    alpha: float | None
    orthonormal: bool
    para: bool


def _settings(config: Config) -> _Settings:
    alpha = config.get("alpha")
    method = one_of(
        "decomposition_method", config.get("decomposition_method", "relu"), ("relu", "qr")
    )
    return _Settings(
        positive_int("r", config.get("r")),
        # 0 counts as none.
        None if alpha is None else number("alpha", alpha) or None,
        method == "qr",
        flag("para", config.get("para")),
    )


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    out_features = shapes[_P][:1]
    # PEFT makes no more vectors than there are outputs.
    rank = min((settings.rank, *out_features))
    shapes.check(_P, (*out_features, rank), f"r in {CONFIG_FILE}")
    if settings.para:
        refuse_surplus(shapes, _R, "para is true")
    else:
        shapes.need(_R)
        shapes.check(_R, (rank, *shapes[_R][1:2]), f"r in {CONFIG_FILE}")
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, module: ModuleTensors) -> tuple[LowRank]:
    rank = min(settings.rank, module.out_features)
    module.check(_P, (module.out_features, rank))
    given = module[_P]
    if settings.orthonormal:
        given = taken_out = torch.linalg.qr(given).Q
    else:
        taken_out = given.relu()
    a = -(taken_out.T @ module.weight())
    if not settings.para:
        module.check(_R, (rank, module.in_features))
        a += module[_R] * (1 if settings.alpha is None else settings.alpha / rank)
    return (LowRank(a, given),)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"alpha", "decomposition_method", "para", "r"},
        harmless={"deft_dropout", "init_scale", "init_weights"},
    ),
    parameters=Parameters((_P,), (_R,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
