"""PEFT's GLoRA (arXiv:2306.07967): `W' = W + W * A + B` and `b' = b + b * D + E + W C`, entry by
entry.

A and B are products of two matrices, or columns, or single numbers. But for the products, that is
a scale of each output, and a number for each by which the sum of the inputs is multiplied.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Bias, Delta, Dense, LowRank, Scale, Side
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, one_of, refuse_surplus
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

# Path -> the key that says how it is made, and in which ways it can be.
_PATHS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "glora_A": ("config_A_B", ("lora", "vector", "constant", "none")),
    "glora_B": ("config_A_B", ("lora", "vector", "constant", "none")),
    "glora_C": ("config_C", ("lora", "vector", "none")),
    "glora_D": ("config_D_E", ("vector", "constant", "none")),
    "glora_E": ("config_D_E", ("vector", "constant", "none")),
}
# Way -> what it has in the file: zeros for what is not trained.
_TENSORS = {"lora": ("Xd", "Xu"), "vector": ("X",), "constant": ("X",), "none": ("zeros",)}
_ALL_TENSORS = frozenset({"Xd", "Xu", "X", "zeros"})
_WEIGHT_PATHS = ("glora_A", "glora_B")


@dataclass(frozen=True)
class _Settings:
    # Path -> how it is made.
    ways: Mapping[str, str]

    @property
    def weight(self) -> str:
        """How A and B are made."""
        return self.ways["glora_A"]


def _settings(config: Config) -> _Settings:
    # Trained biases of the base would be multiplied by D.
    if config.get("bias") not in (None, "none"):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: bias is {reprlib.repr(config['bias'])}; trained biases of the base "
            "are not served with GLoRA, which changes biases itself: train with bias='none'."
        )
    return _Settings(
        {path: one_of(key, config.get(key), ways) for path, (key, ways) in _PATHS.items()}
    )


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    trained = {path for path in _PATHS if _check_path(settings, shapes, path)}
    bias = (Bias.kind,) if trained.difference(_WEIGHT_PATHS) else ()
    if settings.weight == "lora":
        return ModuleOutline(Dense.kind, 0, bias)
    if settings.weight != "none":
        return ModuleOutline(LowRank.kind, 1, (Scale.kind, *bias))
    if bias:
        return ModuleOutline(Bias.kind, 0)
    raise InvalidAdapterError(
        f"Module {shapes.module!r} has zeros alone, so it would give the base model's answers: "
        "target only modules that the adapter changes."
    )


def _check_path(settings: _Settings, shapes: ModuleShapes, path: str) -> bool:
    """Whether it is trained here. Raises InvalidAdapterError for tensors of another way."""
    way = settings.ways[path]
    # Over a layer without a bias, there is nothing to train of the others.
    if path not in _WEIGHT_PATHS and f"{path}.zeros" in shapes:
        way = "none"
    shapes.need(*(f"{path}.{tensor}" for tensor in _TENSORS[way]))
    for tensor in _ALL_TENSORS.difference(_TENSORS[way]):
        refuse_surplus(shapes, f"{path}.{tensor}", f"{_PATHS[path][0]} is {settings.ways[path]!r}")
    if way == "lora":
        _, rank = shapes.dimensions(f"{path}.Xd", 2)
        shapes.check(f"{path}.Xu", (rank, *shapes[f"{path}.Xu"][1:]), f"the rank of {path}.Xd")
    return way != "none"


def _read(settings: _Settings, module: ModuleTensors) -> tuple[Delta, ...]:
    outputs, inputs = module.out_features, module.in_features
    a, b = (_value(settings, module, path, (outputs, inputs)) for path in _WEIGHT_PATHS)
    # [out, 1]
    scale = torch.ones(outputs, 1)
    deltas: list[Delta] = []
    if settings.weight == "lora":
        deltas.append(Dense(module.weight() * a + b))
    elif settings.weight != "none":
        scale = scale + a
        deltas.append(Scale(scale.flatten(), Side.OUTPUT))
        deltas.append(LowRank(torch.ones(1, inputs), b.expand(outputs, 1).contiguous()))
    c = _value(settings, module, "glora_C", (inputs, 1))
    d, e = (_value(settings, module, path, (outputs,)) for path in ("glora_D", "glora_E"))
    bias = module.bias()
    if bias is not None:
        changed = bias * (1 + d) + e + (module.weight() @ c.expand(inputs, 1)).flatten()
        deltas.append(Bias(changed - scale.flatten() * bias))
    return tuple(deltas)


def _value(settings: _Settings, module: ModuleTensors, path: str, shape: Shape) -> Tensor:
    """Broadcasts to the shape."""
    way = settings.ways[path]
    zeros = f"{path}.zeros" in module
    if way != "none" and path not in _WEIGHT_PATHS and zeros != (module.bias() is None):
        raise InvalidAdapterError(
            f"Module {module.module!r} was trained over a layer with{'out' * zeros} a bias, unlike "
            "the base model's: load it over the base that it was trained on."
        )
    if zeros:
        module.check(f"{path}.zeros", shape)
        if module[f"{path}.zeros"].any():
            raise InvalidAdapterError(
                f"The {path}.zeros of module {module.module!r} are not all 0: save the adapter "
                "again from the trained model."
            )
        return torch.zeros(1)
    if way == "lora":
        rank = module.shapes[f"{path}.Xd"][1]
        module.check(f"{path}.Xd", (shape[0], rank))
        module.check(f"{path}.Xu", (rank, shape[1]))
        return module[f"{path}.Xd"] @ module[f"{path}.Xu"]
    # A column, also where the whole is a matrix.
    column = (shape[0], *(1 for _ in shape[1:]))
    module.check(f"{path}.X", (1,) if way == "constant" else column)
    return module[f"{path}.X"]


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"bias", *(key for key, _ in _PATHS.values())},
        # The rank has no part in the scale, and the tensors have it.
        harmless={"init_weights", "r"},
    ),
    parameters=Parameters(
        required=(),
        optional=tuple(f"{path}.{tensor}" for path in _PATHS for tensor in sorted(_ALL_TENSORS)),
    ),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
