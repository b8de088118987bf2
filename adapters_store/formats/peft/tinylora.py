"""PEFT's TinyLoRA (arXiv:2602.04118): `dW = B R A`, A and B from the base weight's singular value
decomposition, and R the sum of `v[i] * P[i]`, P random.

Only v is trained. Modules in groups share one; the groups follow the order of the base model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    Config,
    flag,
    key_rules,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import refuse_surplus, seed
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_A, _B, _P = "tinylora_A", "tinylora_B", "tinylora_P"
# Numbers of a module that the file does not have; they take 40 ms.
_MOST_DRAWN = 1 << 22
# Followed by the number of a group.
_V = "base_model.tinylora_v."


@dataclass(frozen=True)
class _Settings:
    rank: int
    # How many numbers v has.
    u: int
    # 0 for a v for each module, 1 for one in all.
    tying: float
    seed: int
    # Whether the file has P.
    saved: bool

    def group(self, index: int, modules: int) -> tuple[int, int]:
        """Of the module with this index: the number of its group, and how many groups there are."""
        groups = max(1, round(modules * (1.0 - self.tying)))
        return min(index // (modules // groups), groups - 1), groups


def _settings(config: Config) -> _Settings:
    tying = number("weight_tying", config.get("weight_tying", 0))
    if not 0 <= tying <= 1:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: weight_tying is {tying:g}, but must be from 0 to 1."
        )
    return _Settings(
        positive_int("r", config.get("r")),
        positive_int("u", config.get("u")),
        tying,
        seed("projection_seed", config.get("projection_seed")),
        flag("save_projection", config.get("save_projection", True)),
    )


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    in_, out = shapes[_A][1:2], shapes[_B][:1]
    # A matrix has no more singular values than rows or columns.
    rank = min(settings.rank, *in_, *out)
    why = f"u and r in {CONFIG_FILE}"
    shapes.check(_A, (rank, *in_), why)
    shapes.check(_B, (*out, rank), why)
    if settings.saved:
        shapes.need(_P)
        shapes.check(_P, (settings.u, rank, rank), why)
    else:
        refuse_surplus(shapes, _P, "save_projection is false")
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    rank, is_embedding = tensors.shapes[_A][0], tensors.module == EMBEDDING
    out, in_ = tensors.out_features, tensors.in_features
    # Of the embedding PEFT takes the weight as it is stored: a row for each token.
    rows, columns = (in_, out) if is_embedding else (out, in_)
    tensors.check(_A, (rank, columns))
    tensors.check(_B, (rows, rank))
    index = tensors.modules.index(tensors.module)
    r = torch.einsum("i,ijk->jk", _v(settings, tensors, index), _p(settings, tensors, index, rank))
    if is_embedding:
        return (LowRank(tensors[_B].T.contiguous(), (r @ tensors[_A]).T.contiguous()),)
    return (LowRank(tensors[_A], tensors[_B] @ r),)


def _v(settings: _Settings, tensors: ModuleTensors, index: int) -> Tensor:
    group, groups = settings.group(index, len(tensors.modules))
    if tensors.shapes.num_shared != groups:
        raise InvalidAdapterError(
            f"The file has {tensors.shapes.num_shared} vectors {_V}<number>, but its "
            f"{len(tensors.modules)} modules share {groups} (weight_tying in {CONFIG_FILE}): save "
            "the adapter again from the trained model."
        )
    name = f"{_V}{group}"
    tensors.shapes.need(name)
    tensors.shapes.check(name, (settings.u,), f"u = {settings.u} in {CONFIG_FILE}")
    return tensors[name]


def _p(settings: _Settings, tensors: ModuleTensors, index: int, rank: int) -> Tensor:
    """[u, rank, rank]. Made again in float32; PEFT rounds it to the base's dtype."""
    if settings.saved:
        return tensors[_P]
    if settings.u * rank**2 > _MOST_DRAWN:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: with u = {settings.u} and rank {rank}, the random {_P} of "
            f"{tensors.module!r} has more than {_MOST_DRAWN} numbers: train with a smaller u or r, "
            "or save the adapter again with save_projection=True."
        )
    generator = torch.Generator().manual_seed(seed("projection_seed", settings.seed + index))
    size = (settings.u, rank, rank)
    return torch.normal(0.0, 1.0 / (rank**0.5), size, generator=generator)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"projection_seed", "r", "save_projection", "u", "weight_tying"},
        harmless={"init_v_bound", "init_weights", "tinylora_dropout"},
    ),
    parameters=Parameters((_A, _B), (_P,), (_V,)),
    outline_module=_outline,
    read_module=_read,
    settings=_settings,
)
