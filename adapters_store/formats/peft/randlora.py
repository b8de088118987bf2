"""PEFT's RandLoRA (arXiv:2502.00987): a sum of products of random bases, which all modules share,
each scaled by trained diagonal matrices; together of full rank.

The bases A `[rank, 1, smallest]` and B `[largest, count, rank]` are in the file, or, without
`save_projection`, drawn from a seed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    Config,
    flag,
    key_rules,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, refuse_surplus, seed
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"
_A, _B = "randlora_A", "randlora_B"
_SHARED_A, _SHARED_B = f"base_model.{_A}", f"base_model.{_B}"


class _Kind(Enum):
    """What the entries of the bases are drawn from."""

    UNIFORM = auto()
    # -1, 0 and 1.
    SPARSE = auto()
    VERY_SPARSE = auto()


@dataclass(frozen=True)
class _Settings:
    rank: int
    scale: float
    # Whether the file has the bases.
    saved: bool
    seed: int
    kind: _Kind


def _settings(config: Config) -> _Settings:
    rank = positive_int("r", config.get("r"))
    kind = _Kind.SPARSE if flag("sparse", config.get("sparse")) else _Kind.UNIFORM
    return _Settings(
        rank,
        number("randlora_alpha", config.get("randlora_alpha")) / rank,
        flag("save_projection", config.get("save_projection", True)),
        seed("projection_prng_key", config.get("projection_prng_key")),
        _Kind.VERY_SPARSE if flag("very_sparse", config.get("very_sparse")) else kind,
    )


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank, why = settings.rank, f"r = {settings.rank} in {CONFIG_FILE}"
    _, count = shapes.dimensions(_LAMBDA, 2)
    shapes.check(_LAMBDA, (rank, count), why)
    shapes.check(_GAMMA, (count, *shapes[_GAMMA][1:2]), f"the number of bases in its {_LAMBDA}")
    if settings.saved:
        shapes.need(_SHARED_A, _SHARED_B)
        _, _, width = shapes.dimensions(_SHARED_A, 3)
        shapes.check(_SHARED_A, (rank, 1, width), why)
        shapes.check(_SHARED_B, (*shapes[_SHARED_B][:2], rank), why)
    else:
        for basis in (_A, _B, _SHARED_A, _SHARED_B):
            refuse_surplus(shapes, basis, "save_projection is false")
    return ModuleOutline(Dense.kind, 0)


def _read(settings: _Settings, module: ModuleTensors) -> tuple[Dense]:
    outputs, inputs, rank = module.out_features, module.in_features, settings.rank
    smallest, largest = min(outputs, inputs), max(outputs, inputs)
    count = math.ceil(smallest / rank)
    module.check(_LAMBDA, (rank, count))
    module.check(_GAMMA, (count, smallest))
    _check_copies(module)
    a, b = module[_SHARED_A][:, :, :smallest], module[_SHARED_B][:largest, :count]
    if a.shape[2] < smallest or b.shape[:2] != (largest, count):
        raise InvalidAdapterError(
            f"{_SHARED_A} and {_SHARED_B} are too small for the base model's {module.module!r} of "
            f"shape {[outputs, inputs]}: load it over the base that it was trained on."
        )
    scaled = module[_LAMBDA].unsqueeze(2) * a * module[_GAMMA]
    # PEFT pairs them like this: of A's rows the rank is the first axis, of B's columns the last.
    product = b.flatten(1) @ scaled.flatten(0, 1) * settings.scale
    return (Dense(product if smallest == inputs else product.T.contiguous()),)


def _check_copies(module: ModuleTensors) -> None:
    """PEFT writes the bases once more with each module. Raises InvalidAdapterError when these are
    others."""
    for copy, shared in ((_A, _SHARED_A), (_B, _SHARED_B)):
        if copy in module and not torch.equal(module[copy], module[shared]):
            raise InvalidAdapterError(
                f"Module {module.module!r} has a {copy} that is not {shared}, so it is not certain "
                "which is meant: save the adapter again from the trained model."
            )


def _regenerate(
    settings: _Settings, modules: Sequence[str], layout: BaseLayout
) -> dict[str, Tensor]:
    """Of the size that the largest of the modules needs."""
    if settings.saved:
        return {}
    sides = [layout.target_shapes[module] for module in modules]
    limits = [max(outputs for outputs, _ in sides), max(inputs for _, inputs in sides)]
    rank, smallest, largest = settings.rank, min(limits), max(limits)
    if rank > smallest:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: r is {rank}, more than the {smallest} inputs or outputs of the "
            "adapter's layers: save the adapter again with save_projection=True."
        )
    generator = torch.Generator().manual_seed(settings.seed)
    shape_a, count = (rank, 1, smallest), math.ceil(smallest / rank)
    if settings.kind is _Kind.UNIFORM:
        a = _uniform(shape_a, generator)
        b = torch.cat([_uniform((largest, 1, rank), generator) for _ in range(count)], 1)
    else:
        share = 1 / 6 if settings.kind is _Kind.SPARSE else 1 / (2 * math.sqrt(smallest))
        a = _ternary(shape_a, generator, share)
        b = _ternary((largest, count, rank), generator, share)
    return {_SHARED_A: (a / a.std()).float(), _SHARED_B: (b / b.std()).float()}


def _ternary(shape: Shape, generator: torch.Generator, share: float) -> Tensor:
    """Each entry is -1 or 1 with a probability of `share` each, else 0."""
    uniform = torch.rand(shape, generator=generator)
    return (uniform > 1 - share).float() - (uniform < share).float()


def _uniform(shape: Shape, generator: torch.Generator) -> Tensor:
    """In bfloat16, as PEFT draws it: other numbers come of the same seed in another dtype."""
    empty = torch.empty(shape, dtype=torch.bfloat16)
    return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={
            "projection_prng_key",
            "r",
            "randlora_alpha",
            "save_projection",
            "sparse",
            "very_sparse",
        },
        harmless={"init_weights", "randlora_dropout"},
    ),
    parameters=Parameters((_LAMBDA, _GAMMA), optional=(_A, _B), shared=(_SHARED_A, _SHARED_B)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
    regenerate=_regenerate,
)
