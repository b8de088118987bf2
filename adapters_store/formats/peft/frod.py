"""PEFT's FRoD: W is replaced by `U (diag(l) + S) V^T` with a sparse S, so `dW` is the difference.

V, which all modules of a role (q_proj, ...) share, and the places of S are in the file; U follows
from V and the base's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta, Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, flag, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_DIAGONAL, _VALUES = "frod_lambda_l", "frod_lambda_s_values"
_V, _PLACES, _SIZE = "frod_V", "frod_s_indices", "frod_s_size"
_SHARED = "base_model."

T = TypeVar("T")


class Frod(PeftFormat[Config]):
    """Reads the projections of a role as if each of its modules had them in the file."""

    def outline(self, config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        return super().outline(config, _per_module(shapes))

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
    ) -> dict[str, tuple[Delta, ...]]:
        return super().read(config, _per_module(tensors), layout)


def _outline(config: Config, shapes: ModuleShapes) -> ModuleOutline:
    if not flag("save_projection", config.get("save_projection", True)):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: save_projection is false, and what is computed again from the base's "
            "weights differs from one machine to the next: save the adapter again with "
            "save_projection=True."
        )
    shapes.need(_V, _PLACES, _SIZE)
    (entries,) = shapes.dimensions(_VALUES, 1)
    shapes.check(_PLACES, (2, entries), f"a row and a column for each of its {_VALUES}")
    inputs, _ = shapes.dimensions(_V, 2)
    shapes.check(_V, (inputs, inputs), "a basis of all inputs")
    shapes.check(_DIAGONAL, (inputs,), f"the size of its {_V}")
    shapes.check(_SIZE, (2,), "the size of a matrix")
    return ModuleOutline(Dense.kind, 0)


def _read(_: Config, module: ModuleTensors) -> tuple[Dense]:
    inputs = module.in_features
    module.check(_V, (inputs, inputs))
    places = module.raw(_PLACES)
    sizes = module.raw(_SIZE)
    if places.dtype != torch.int64 or ((places < 0) | (places >= inputs)).any():
        raise InvalidAdapterError(
            f"The {_PLACES} of module {module.module!r} are not rows and columns of a matrix of "
            f"{inputs} by {inputs}: save the adapter again from the trained model."
        )
    if sizes.tolist() != [inputs, inputs]:
        raise InvalidAdapterError(
            f"The {_SIZE} of module {module.module!r} is {sizes.tolist()}, but the base model's "
            f"layer has {inputs} inputs: load it over the base that it was trained on."
        )
    core = torch.diag(module[_DIAGONAL])
    core.index_put_(tuple(places), module[_VALUES], accumulate=True)
    weight, v = module.weight(), module[_V]
    # V is kept in the dtype of the base in training, and U was rounded to it.
    u = _directions(weight, v).to(module.raw(_V).dtype).float()
    return (Dense(u @ core @ v.T - weight),)


def _directions(weight: Tensor, v: Tensor) -> Tensor:
    """`weight @ inverse(v^T)` with columns of norm 1, `[out, in]`, as PEFT computes it."""
    w64, v64 = weight.double(), v.double()
    try:
        factors = torch.linalg.solve(v64, w64.T).T
    except RuntimeError:  # V cannot be inverted.
        factors = w64 @ torch.linalg.pinv(v64, rtol=1e-6).T
    norms = torch.linalg.vector_norm(factors, dim=0)
    return torch.where(norms > 1e-12, factors / norms, 0).float()


def _per_module(named: Mapping[str, T]) -> dict[str, T]:
    """Tensor name -> what it stands for, with those of a role under the names of its modules. One
    whose role no module has keeps its name, and is refused by it."""
    own = dict(named)
    for name in named:
        if not name.endswith(f".{_DIAGONAL}"):
            continue
        module = name.removesuffix(f".{_DIAGONAL}")
        for projection in (_V, _PLACES, _SIZE):
            shared = f"{_SHARED}{projection}.{_role(module)}"
            if shared in named:
                own[f"{module}.{projection}"] = named[shared]
                own.pop(shared, None)
    return own


def _role(module: str) -> str:
    """PEFT's name for modules that do the same in different layers; module: with its prefix."""
    parts = module.removeprefix("base_model.model.").split(".")[-2:]
    return parts[-1] if parts[0].isdigit() else "_".join(parts)


FORMAT = Frod(
    rules=key_rules(
        honoured={"save_projection"},
        harmless={
            # How the projections were made, which are in the file.
            "projection_prng_key",
            "regularization_alpha",
            "sparse_rate",
            # Training, and how PEFT itself runs.
            "frod_dropout",
            "init_weights",
            "progressbar",
            "runtime_offload_base_weight",
        },
    ),
    parameters=Parameters(required=(_DIAGONAL, _VALUES), optional=(_V, _PLACES, _SIZE)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
)
