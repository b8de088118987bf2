"""PEFT's PEANuT (arXiv:2410.01870): `dW` is what a small network makes of W.

Each column of W goes through A, `depth` encoders, as many decoders with residuals between them and
their encoders, and B; all are matrices, with a non-linear function between them. As B comes last,
`dW` has the rank of B, and what comes before it is the other factor.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules, number
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, one_of, refuse_surplus
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_A, _B = "peanut_A.weight", "peanut_B.weight"
_MAX_DEPTH = 16
_ENCODERS = tuple(f"peanut_encoders.{index}.weight" for index in range(_MAX_DEPTH))
_DECODERS = tuple(f"peanut_decoders.{index}.weight" for index in range(_MAX_DEPTH))

_TANH_GELU = partial(F.gelu, approximate="tanh")
# By their names in transformers; those with trained parameters are left out, as the file has none.
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "gelu_accurate": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_new": _TANH_GELU,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "hardswish": F.hardswish,
    "laplace": lambda x: (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))) / 2,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class _Settings:
    function: Callable[[Tensor], Tensor]
    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    scaling: float


def _settings(config: Config) -> _Settings:
    depth = config.get("depth")
    if not isinstance(depth, int) or isinstance(depth, bool) or not 0 <= depth <= _MAX_DEPTH:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: depth is {reprlib.repr(depth)}, but must be a whole number from 0 to "
            f"{_MAX_DEPTH}."
        )
    return _Settings(
        _FUNCTIONS[one_of("act_fn", config.get("act_fn"), tuple(_FUNCTIONS))],
        _ENCODERS[:depth],
        _DECODERS[:depth],
        number("scaling", config.get("scaling")),
    )


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank, _ = shapes.dimensions(_A, 2)
    shapes.check(_B, (*shapes[_B][:1], rank), f"the rank of its {_A}")
    depth = len(settings.encoders)
    for parameter in settings.encoders + settings.decoders:
        shapes.need(parameter)
        shapes.check(parameter, (rank, rank), f"the rank of its {_A}")
    for parameter in _ENCODERS[depth:] + _DECODERS[depth:]:
        refuse_surplus(shapes, parameter, f"depth is {depth}")
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, module: ModuleTensors) -> tuple[LowRank]:
    rank, _ = module.shapes[_A]
    module.check(_A, (rank, module.out_features))
    module.check(_B, (module.out_features, rank))
    # [in, rank]
    columns = settings.function(module.weight().T @ module[_A].T)
    residuals = []
    for encoder in settings.encoders:
        residuals.append(columns)
        columns = settings.function(columns @ module[encoder].T)
    for decoder in settings.decoders:
        columns = settings.function(columns @ module[decoder].T) + residuals.pop()
    return (LowRank(columns.T.contiguous(), module[_B] * settings.scaling),)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"act_fn", "depth", "scaling"},
        # The rank, the tensors say.
        harmless={"init_weights", "r"},
    ),
    parameters=Parameters(required=(_A, _B), optional=_ENCODERS + _DECODERS),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
