"""PEFT's HRA (arXiv:2405.17484): the layer's input passes through r Householder reflections.

`y = W H_1 ... H_r x + b` with `H_i = I - 2 u_i u_i^T`, u_i of length 1. With these vectors side by
side in Y, the product is `I - Y T Y^T`, T upper triangular (compact WY form), and the change of W
is `-(W Y T) Y^T`, of rank r. With `apply_GS` the vectors are made orthogonal first; T is 2 I then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, flag, key_rules, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.formats.ranks import check_rank
from polydelta.adapters_store.reference import CONFIG_FILE

_U = "hra_u"

# Of a vector's length: where less than this is left of it once the others' share is taken out, the
# direction of the rest is rounding error.
_MIN_REST = 1e-4


@dataclass(frozen=True)
class _Settings:
    rank: int
    orthogonal: bool


def _settings(config: Config) -> _Settings:
    return _Settings(positive_int("r", config.get("r")), flag("apply_GS", config.get("apply_GS")))


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank = settings.rank
    shapes.check(_U, (*shapes[_U][:1], rank), f"r = {rank} in {CONFIG_FILE}")
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, module: ModuleTensors) -> tuple[LowRank]:
    module.check(_U, (module.in_features, settings.rank))
    # T has as many rows and columns.
    check_rank(module.module, settings.rank, (module.in_features, module.in_features))
    u = module[_U]
    lengths = u.norm(dim=0)
    if (lengths == 0).any():
        raise InvalidAdapterError(
            f"The {_U} of {module.module!r} has a column of zeros, which gives no direction to "
            "reflect along: take an earlier checkpoint."
        )
    if settings.orthogonal:
        y = _orthonormal(module.module, u, lengths)
        b = -2 * (module.weight() @ y)
    else:
        y = u / lengths
        # The inverse of T.
        inverse = (y.T @ y).triu(1) + torch.eye(y.shape[1]) / 2
        b = torch.linalg.solve_triangular(inverse, -(module.weight() @ y), upper=True, left=False)
    return (LowRank(y.T.contiguous(), b),)


def _orthonormal(module: str, u: Tensor, lengths: Tensor) -> Tensor:
    """u: [in, r]. A basis of what its columns span; any will do, for `I - 2 Y Y^T` is the same."""
    basis: Tensor
    basis, rest = torch.linalg.qr(u)
    if u.shape[1] > u.shape[0] or (rest.diagonal().abs() <= _MIN_REST * lengths).any():
        raise InvalidAdapterError(
            f"The {_U} of {module!r} has columns that are nearly linear combinations of others, "
            "and what apply_GS makes of them is rounding error: train with a smaller r, or with "
            "apply_GS=False."
        )
    return basis


FORMAT = PeftFormat(
    rules=key_rules(honoured={"apply_GS", "r"}, harmless={"init_weights"}),
    parameters=Parameters((_U,)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
