"""PEFT's BOFT (arXiv:2311.06243): the layer's input is rotated by a product of butterfly factors,
and its output, but for the bias, is scaled.

`y = s * (W (x R)) + b`, so `dW = diag(s) W R^T - W`. Each factor of R is block-diagonal between a
permutation and its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.rotations import cayley
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters

_R, _S = "boft_R", "boft_s"


def _outline(_config: Config, shapes: ModuleShapes) -> ModuleOutline:
    factors, blocks, size, _ = shapes.dimensions(_R, 4)
    shapes.check(_R, (factors, blocks, size, size), "a rotation of square blocks")
    shapes.check(_S, (*shapes[_S][:1], 1), "one scale an output")
    odd = factors > 1 and (size % 2 or blocks % (1 << min(factors - 1, 63)))
    if 0 in (factors, blocks, size) or odd:
        raise InvalidAdapterError(
            f"Module {shapes.module!r} has {factors} butterfly factors of {blocks} blocks of "
            f"{size}, which do not fit together: save the adapter again from the trained model."
        )
    return ModuleOutline(Dense.kind, 0)


def _read(_config: Config, module: ModuleTensors) -> tuple[Dense]:
    factors, blocks, size, _ = module.shapes[_R]
    module.check(_S, (module.out_features, 1))
    if blocks * size != module.in_features:
        raise InvalidAdapterError(
            f"Module {module.module!r} is rotated in {blocks} blocks of {size}, but the base "
            f"model's layer has {module.in_features} inputs: load it over the base that it was "
            "trained on."
        )
    rotation = torch.eye(module.in_features)
    for level, factor in enumerate(module[_R]):
        rotation = _butterfly(factor, level if factors > 1 else None) @ rotation
    weight = module.weight()
    return (Dense(module[_S] * (weight @ rotation.T) - weight),)


def _butterfly(factor: Tensor, level: int | None) -> Tensor:
    """factor: [blocks, size, size] -> [in, in]. Without a level nothing is permuted."""
    rotations: Tensor = torch.block_diag(*cayley((factor - factor.transpose(1, 2)) / 2))
    if level is None:
        return rotations
    order = _permutation(len(rotations), factor.shape[1] // 2, level)
    return rotations[order][:, order]


def _permutation(entries: int, half: int, level: int) -> Tensor:
    """Within each group of `2 ** (level + 1)` half-blocks, first those at even places, then those
    at odd ones."""
    # [groups, half-blocks of a group, half]
    places = torch.arange(entries).view(-1, 2 << level, half)
    return torch.cat((places[:, 0::2], places[:, 1::2]), 1).flatten()


FORMAT = PeftFormat(
    rules=key_rules(
        # How many factors and blocks there are, the tensors say: PEFT itself makes fewer factors
        # than the config asks for, where it cannot build its CUDA extension.
        harmless={
            "boft_block_num",
            "boft_block_size",
            "boft_dropout",
            "boft_n_butterfly_factor",
            "init_weights",
        },
    ),
    parameters=Parameters(required=(_R, _S)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
)
