"""An adapter's tensors in 8, 4 or 1 bits, as `formats/quantized.py` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import MAX_CONFIG_BYTES, to_float32
from polydelta.adapters_store.formats.peft_config import Config
from polydelta.adapters_store.formats.quantized import (
    LEVELS,
    QUANTIZATION,
    SCALE_SUFFIX,
    Quantization,
    packed_codes,
)

# Smaller tensors would hardly shrink: the scales and their entry in the header take bytes, too.
_MIN_ELEMENTS = 512
# Vectors stay as they are, because most of them multiply a layer's whole output. These are long
# lists of what is added to a weight.
_LISTS_OF_VALUES = (
    "fourierft_spectrum",
    "sft_values",
    "shira_weight",
    "supertuning_values",
    "unilora_theta_d",
    "waveft_spectrum",
)
# Of the scale that just holds a group's largest number. The first still holds it when it is rounded
# to bfloat16; a small one clips, which around 4 bits loses less than its finer steps gain.
_SHARES = (1 + 2**-8, *torch.linspace(1.0, 0.5, 26).tolist())


def quantize(
    config: Config, tensors: Mapping[str, Tensor], bits: int, group_size: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the quantised adapter.

    Of each group of `group_size` elements the scale is the one with the least squared error: for 1
    bit the mean of `|x|`, else the best of some shares of the largest `|x|`. Integers, vectors that
    scale whole outputs, and small tensors stay as they are.

    Raises InvalidAdapterError when nothing can be quantised, when numbers are not finite, and for
    bits other than 8, 4 and 1.
    """
    if bits not in LEVELS:
        raise InvalidAdapterError(f"bits is {bits}: take 8, 4 or 1.")
    if group_size < 1:
        raise InvalidAdapterError(f"group_size is {group_size}: take 1 or more, such as 64.")
    chosen = {name: tensor for name, tensor in tensors.items() if _worth_it(name, tensor, bits)}
    if not chosen:
        raise InvalidAdapterError(
            f"The adapter has no matrix of {_MIN_ELEMENTS} numbers or more in more than {bits} "
            "bits, so quantising would not make it smaller: leave it as it is, or take fewer bits."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in chosen.items()}
    told = {**config, QUANTIZATION: Quantization(bits, group_size, shapes).as_config()}
    if len(json.dumps(told, indent=2)) > MAX_CONFIG_BYTES:
        raise InvalidAdapterError(
            f"The shapes of {len(shapes)} tensors make the config larger than {MAX_CONFIG_BYTES} "
            "bytes, which is not read: leave the adapter as it is."
        )
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in chosen:
            codes, scales = _quantized(to_float32(name, tensor), bits, group_size)
            stored[name], stored[f"{name}{SCALE_SUFFIX}"] = packed_codes(codes, bits), scales
        else:
            stored[name] = tensor
    return told, stored


def _worth_it(name: str, tensor: Tensor, bits: int) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.element_size() * 8 > bits
        and tensor.numel() >= _MIN_ELEMENTS
        and (tensor.dim() > 1 or name.endswith(_LISTS_OF_VALUES))
    )


def _quantized(tensor: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes `[elements]` float32, and scales `[groups]` bfloat16."""
    flat = tensor.flatten()
    count = len(flat)
    groups = torch.nn.functional.pad(flat, (0, -count % group_size)).view(-1, group_size)
    if bits == 1:
        sizes = torch.full((len(groups),), float(group_size))
        sizes[-1] -= -count % group_size
        codes, scales = groups.sign(), groups.abs().sum(1) / sizes
        codes[codes == 0] = 1
        scales = scales.bfloat16()
    else:
        scales = _best_scales(groups, LEVELS[bits])
        codes = _codes(groups, scales.float(), LEVELS[bits])
    return codes.flatten()[:count], scales


def _best_scales(groups: Tensor, level: int) -> Tensor:
    """`[groups]` bfloat16."""
    largest = groups.abs().amax(1)
    # Squares of the numbers themselves may not fit float32.
    unit = torch.where(largest > 0, largest, 1.0)
    relative = groups / unit.unsqueeze(1)
    best = torch.zeros_like(largest, dtype=torch.bfloat16)
    least = torch.full_like(largest, torch.inf)
    for share in _SHARES:
        # Rounded first, so that the codes are chosen for the scale that is stored.
        scales = (largest * (share / level)).bfloat16()
        steps = scales.float() / unit
        error = (_codes(relative, steps, level) * steps.unsqueeze(1) - relative).square().sum(1)
        better = error < least
        best[better], least[better] = scales[better], error[better]
    return best


def _codes(groups: Tensor, scales: Tensor, level: int) -> Tensor:
    """The nearest whole numbers; 0 where the scale is 0."""
    steps = torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    return (groups / steps).round().clamp(-level, level)
