"""PEFT's LoKr (arXiv:2309.14859): `dW = alpha / r * kron(w1, w2)`, where w1 and w2 may each be
given as a product of rank r. Both r and alpha may differ from module to module."""

from __future__ import annotations

import math

from torch import Tensor

from polydelta.adapters_store.delta import Kronecker
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import Scales, linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_FACTORS = ("lokr_w1", "lokr_w2")
# The core of a convolution's w2.
_CORE = "lokr_t2"


def _outline(scales: Scales, shapes: ModuleShapes) -> ModuleOutline:
    if _CORE in shapes:
        raise InvalidAdapterError(
            f"Module {shapes.module!r} has {_CORE}, which belongs to a convolution: load the "
            "adapter over the base that it was trained on."
        )
    rank = scales.ranks[shapes.module]
    why = f"rank {rank} (r and rank_pattern in {CONFIG_FILE})"
    for factor in _FACTORS:
        _check_factor(factor, rank, why, shapes)
    numbers = sum(math.prod(_shape(factor, shapes)) for factor in _FACTORS)
    return ModuleOutline(Kronecker.kind, 0, numbers=numbers)


def _check_factor(factor: str, rank: int, why: str, shapes: ModuleShapes) -> None:
    a, b = f"{factor}_a", f"{factor}_b"
    if factor in shapes:
        if a in shapes or b in shapes:
            raise InvalidAdapterError(
                f"Module {shapes.module!r} has {factor} both whole and as a product: save the "
                "adapter again from the trained model."
            )
        shapes.dimensions(factor, 2)
    elif a in shapes or b in shapes:
        shapes.need(a, b)
        shapes.check_factors(b, a, rank, why)
    else:
        shapes.need(factor)


def _read(scales: Scales, module: ModuleTensors) -> tuple[Kronecker]:
    (a, b), (c, d) = (_shape(factor, module.shapes) for factor in _FACTORS)
    module.check_change((a * c, b * d))
    left, right = (_value(factor, module) for factor in _FACTORS)
    return (Kronecker(left, right * scales[module.module]),)


def _shape(factor: str, shapes: ModuleShapes) -> tuple[int, int]:
    if factor in shapes:
        return shapes[factor][0], shapes[factor][1]
    return shapes[f"{factor}_a"][0], shapes[f"{factor}_b"][1]


def _value(factor: str, module: ModuleTensors) -> Tensor:
    return module[factor] if factor in module else module[f"{factor}_a"] @ module[f"{factor}_b"]


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"alpha", "alpha_pattern", "r", "rank_pattern"},
        harmless={
            # How the factors were started, and their sizes chosen; the file has the factors.
            "decompose_both",
            "decompose_factor",
            "init_weights",
            "module_dropout",
            "rank_dropout",
            "rank_dropout_scale",
            # About convolutions.
            "use_effective_conv2d",
        },
    ),
    parameters=Parameters(
        (), (*(f"{factor}{part}" for factor in _FACTORS for part in ("", "_a", "_b")), _CORE)
    ),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=Scales.of,
)
