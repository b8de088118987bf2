"""What an adapter needs to know of the base model: its linear layers, by name and shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LinearPart:
    """One linear layer as checkpoints name it, e.g. `self_attn.q_proj`."""

    name: str
    out_features: int


@dataclass(frozen=True)
class FusedLinear:
    """Linear layers that read the same input and are computed as one matrix, rows stacked in the
    order of `parts`: q/k/v, or gate/up. A layer that stands alone has one part."""

    name: str
    in_features: int
    parts: tuple[LinearPart, ...]

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    def spans(self) -> Iterator[tuple[LinearPart, int]]:
        """Each part with the output row at which it starts."""
        start = 0
        for part in self.parts:
            yield part, start
            start += part.out_features


@dataclass(frozen=True)
class BaseLayout:
    """The linear layers of a base model. Every decoder block has the same ones."""

    # Digest of the base model's shapes and name; a packed adapter is valid for one fingerprint.
    fingerprint: str
    num_layers: int
    linears: tuple[FusedLinear, ...]

    def module_name(self, layer: int, part: str) -> str:
        """Full module path, as adapter files write it: `model.layers.3.self_attn.q_proj`."""
        return f"model.layers.{layer}.{part}"

    @cached_property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Full module path -> weight shape `(out_features, in_features)`."""
        return {
            self.module_name(layer, part.name): (part.out_features, linear.in_features)
            for layer in range(self.num_layers)
            for linear in self.linears
            for part in linear.parts
        }
