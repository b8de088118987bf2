"""What each kernel is compiled for: the list that tests compile without a GPU, and that
`python -m benchmarks.kernel_resources` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Floor:
    """The least that one typical launch must do."""

    # What the launch is, in words: "64 rows, rank 16, 4096 -> 4096".
    work: str
    # Read once or written once, in bytes of device memory.
    bytes: float
    # Floating-point operations; 0 where bytes are all that counts.
    flops: float = 0.0


@dataclass(frozen=True)
class ShippedKernel:
    """A kernel in one configuration that the engine launches."""

    # "attention, decode, head 128"
    name: str
    # What `triton.jit` made of it.
    kernel: Any
    # Argument -> type as Triton writes it ("*bf16", "i32", "i64", "fp32"), in the order of the
    # kernel's arguments; without those that are constants.
    signature: Mapping[str, str]
    # tl.constexpr arguments.
    constants: Mapping[str, Any]
    floor: Floor
    # Arguments that are always divisible by 16, pointers in bytes.
    aligned: tuple[str, ...] = ()
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    # Whether most steps launch it: such a one must not spill registers.
    hot: bool = True
