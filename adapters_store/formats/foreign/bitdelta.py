"""BitDelta (arXiv:2402.10193): `dW = scale * sign`, one bit for each entry and one scale for each
linear layer. It makes an adapter of any full fine-tune.

`bitdelta_bits` is packed as in `OneBit.bits`. PEFT has no such tuner: `polydelta adapters
distill-delta` and `polydelta adapters import bitdelta` write these folders.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polydelta.adapters_store.delta import Bias, Delta, OneBit
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_tensors import Parameters

# A module has the first two, the third, or all: of a base with biases, what is added to them.
BITS, SCALE, BIAS = "bitdelta_bits", "bitdelta_scale", "bitdelta_bias"


def pack_signs(dense: Tensor) -> Tensor:
    """`[out, in]` -> the bits of its signs as in `OneBit.bits`; 0 counts as positive, as in the
    authors' code."""
    return torch.from_numpy(np.packbits((dense >= 0).numpy(), axis=1, bitorder="little"))


def _outline_module(_: Config, shapes: ModuleShapes) -> ModuleOutline:
    if BITS not in shapes and SCALE not in shapes:
        return ModuleOutline(Bias.kind, 0)
    shapes.need(BITS, SCALE)
    shapes.check(SCALE, (1,), "one scale for each layer")
    return ModuleOutline(OneBit.kind, 0)


def _read_module(_: Config, tensors: ModuleTensors) -> tuple[Delta, ...]:
    deltas: list[Delta] = []
    if BITS in tensors:
        tensors.check(BITS, (tensors.out_features, -(-tensors.in_features // 8)))
        bits = tensors.raw(BITS)
        if bits.dtype != torch.uint8:
            raise InvalidAdapterError(
                f"Module {tensors.module!r} has {BITS} of type {bits.dtype}: signs must be packed "
                "8 in a torch.uint8."
            )
        deltas.append(OneBit(tensors.in_features, bits, float(tensors[SCALE])))
    if BIAS in tensors:
        tensors.check(BIAS, (tensors.out_features,))
        deltas.append(Bias(tensors[BIAS]))
    return tuple(deltas)


FORMAT = PeftFormat(
    rules=key_rules(),
    parameters=Parameters(required=(), optional=(BITS, SCALE, BIAS)),
    outline_module=_outline_module,
    read_module=_read_module,
    targets=lambda layout: layout.module_shapes,
)
