"""Adapters of any format whose larger tensors are stored in 8, 4 or 1 bits.

`polydelta_quantization` in the config says how, and the shape of every such tensor. Its elements,
the last axis running fastest, form groups of `group_size`; the last group may be smaller. Under the
tensor's own name lie its codes, and under the name with `.polydelta_scale` one bfloat16 scale for
each group:

    8 bits   int8, value = code * scale
    4 bits   uint8, two elements in a byte, the first in the lower half; value = (code - 8) * scale
    1 bit    uint8, eight elements in a byte, the first in the lowest bit; value = scale or -scale

Parsers see plain tensors: this is undone before they are asked.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.peft_config import Config, mapping
from polydelta.adapters_store.formats.peft_tensors import check_shape
from polydelta.adapters_store.formats.safetensors_header import MAX_DIMENSIONS, MAX_ELEMENTS
from polydelta.adapters_store.reference import CONFIG_FILE

QUANTIZATION = "polydelta_quantization"
SCALE_SUFFIX = ".polydelta_scale"
# Bits -> the largest code; that of 1 bit is its sign.
LEVELS = {8: 127, 4: 7, 1: 1}

# Elements that are unpacked at a time.
_PIECE = 1 << 20

_REPEAT = "quantise the adapter again with `polydelta adapters quantize`"


@dataclass(frozen=True)
class Quantization:
    """How the tensors of one adapter are stored."""

    bits: int
    group_size: int
    # Of each quantised tensor, by name: its shape before.
    shapes: Mapping[str, Shape]

    def num_groups(self, count: int) -> int:
        return -(-count // self.group_size)

    def num_codes(self, count: int) -> int:
        """Elements of the tensor that holds the codes of `count` elements."""
        return -(-count * self.bits // 8)

    def as_config(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"bits": self.bits, "group_size": self.group_size, "shapes": shapes}


def read_quantization(config: Config) -> Quantization | None:
    """None when the adapter is stored plainly. Raises InvalidAdapterError for values that
    `as_config` does not write."""
    if config.get(QUANTIZATION) is None:
        return None
    told = mapping(QUANTIZATION, config[QUANTIZATION])
    if told.keys() != {"bits", "group_size", "shapes"}:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {QUANTIZATION} has the keys {reprlib.repr(sorted(told))}, but must "
            f"have bits, group_size and shapes: {_REPEAT}."
        )
    bits, group_size = told["bits"], told["group_size"]
    if not _is_size(bits) or bits not in LEVELS:
        raise _wrong("bits", bits, "8, 4 or 1")
    if not _is_size(group_size) or group_size == 0:
        raise _wrong("group_size", group_size, "a whole number above 0")
    shapes: dict[str, Shape] = {}
    for name, shape in mapping(f"{QUANTIZATION}.shapes", told["shapes"]).items():
        sound = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        if not sound or not all(map(_is_size, shape)) or math.prod(shape) > MAX_ELEMENTS:
            raise _wrong(f"shapes[{name[:200]!r}]", shape, "a list of sizes")
        shapes[name] = tuple(shape)
    return Quantization(bits, group_size, shapes)


def plain_shapes(config: Config, shapes: Mapping[str, Shape]) -> tuple[Config, Mapping[str, Shape]]:
    """Config and shapes as the adapter's format has them, from those of the file's header. Raises
    InvalidAdapterError when the two do not go together."""
    quantization = read_quantization(config)
    if quantization is None:
        return config, shapes
    plain = dict(shapes)
    for name, shape in quantization.shapes.items():
        count = math.prod(shape)
        for stored, size in (
            (name, quantization.num_codes(count)),
            (f"{name}{SCALE_SUFFIX}", quantization.num_groups(count)),
        ):
            if stored not in plain:
                raise InvalidAdapterError(
                    f"{CONFIG_FILE}: {QUANTIZATION} tells of a tensor {stored[:200]!r}, which is "
                    f"not in the file: copy the file again, or {_REPEAT}."
                )
            check_shape(stored, plain[stored], (size,), QUANTIZATION)
        del plain[f"{name}{SCALE_SUFFIX}"]
        plain[name] = shape
    return {key: value for key, value in config.items() if key != QUANTIZATION}, plain


def dequantised(
    config: Config, tensors: Mapping[str, Tensor], limit: int | None = None
) -> tuple[Config, Mapping[str, Tensor]]:
    """Config and tensors as the adapter's format has them; what was quantised is float32 then.

    limit: the most elements that an adapter may sensibly have; one in 1 bit takes 32 times its
    file. Raises InvalidAdapterError for more of them, and as `plain_shapes` does.
    """
    quantization = read_quantization(config)
    if quantization is None:
        return config, tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    plain_config, plain = plain_shapes(config, shapes)
    count = sum(math.prod(shape) for shape in plain.values())
    if limit is not None and count > limit:
        raise InvalidAdapterError(
            f"The adapter unpacks to {count} numbers, far more than the base model has: it was not "
            "made for this base."
        )
    return plain_config, {
        name: _dequantised(name, tensors, quantization)
        if name in quantization.shapes
        else tensors[name]
        for name in plain
    }


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """codes: `[n]`, whole numbers from -LEVELS to LEVELS, of 1 bit -1 or 1 -> `[num_codes]`."""
    if bits == 8:
        return codes.to(torch.int8)
    numbers = (codes + 8 if bits == 4 else codes > 0).to(torch.uint8)
    in_a_byte = 8 // bits
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % in_a_byte))
    return (numbers.view(-1, in_a_byte) << _places(bits)).sum(1, dtype=torch.uint8)


def unpacked_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes, `[count]` float32."""
    if bits == 8:
        return packed.float()
    numbers = (packed.unsqueeze(1) >> _places(bits) & ((1 << bits) - 1)).flatten()[:count].float()
    return numbers - 8 if bits == 4 else numbers * 2 - 1


def _dequantised(name: str, tensors: Mapping[str, Tensor], how: Quantization) -> Tensor:
    shape, packed = how.shapes[name], tensors[name]
    expected = torch.int8 if how.bits == 8 else torch.uint8
    if packed.dtype != expected:
        raise InvalidAdapterError(
            f"Tensor {name!r} is {packed.dtype}, but codes of {how.bits} bits are {expected}: "
            f"{_REPEAT}."
        )
    scales = to_float32(f"{name}{SCALE_SUFFIX}", tensors[f"{name}{SCALE_SUFFIX}"])
    values = torch.empty(math.prod(shape))
    # In pieces: unpacked all at once, it takes five times what the values take.
    for start in range(0, len(values), _PIECE):
        places = range(start, min(start + _PIECE, len(values)))
        codes = packed[start * how.bits // 8 : (start + _PIECE) * how.bits // 8]
        torch.mul(
            unpacked_codes(codes, how.bits, len(places)),
            _scales_of(places, scales, how.group_size),
            out=values[start : places.stop],
        )
    return values.view(shape)


def _scales_of(places: range, scales: Tensor, group_size: int) -> Tensor:
    """That of each of these elements."""
    first, last = places[0] // group_size, places[-1] // group_size
    bounds = torch.arange(first, last + 2) * group_size
    return scales[first : last + 1].repeat_interleave(
        bounds.clamp(places.start, places.stop).diff()
    )


def _places(bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ELEMENTS


def _wrong(field: str, value: object, wanted: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"{CONFIG_FILE}: {QUANTIZATION}.{field} is {reprlib.repr(value)}, but must be {wanted}: "
        f"{_REPEAT}."
    )
