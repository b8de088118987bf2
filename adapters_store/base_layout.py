"""What an adapter needs to know of the base model: what it can change, by name and shape; and, for
formats that need it, the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
# Where deltas are kept that concern no single module.
MODEL = "model"


class BaseWeights(Protocol):
    """The base model's weights as it is served with them. Threads may share it."""

    def read(self, name: str) -> Tensor:
        """By Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), rounded to the dtype in
        which the model is served, in float32."""
        ...


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
    # Whether the base's parts have biases.
    bias: bool = False

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
class NormPart:
    """One norm of a decoder block, e.g. `input_layernorm`."""

    name: str
    size: int


@dataclass(frozen=True)
class BaseLayout:
    """The parts of a base model. Every decoder block has the same ones."""

    # Digest of the base model's shapes and name.
    fingerprint: str
    num_layers: int
    linears: tuple[FusedLinear, ...]
    norms: tuple[NormPart, ...] = ()
    hidden_size: int = 0
    vocab_size: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    # Whether the head is the embedding.
    tied: bool = False
    weights: BaseWeights | None = field(default=None, compare=False, repr=False)
    # What tells these weights from others of the same shapes and name; "" where none are at hand.
    weights_id: str = field(default="", compare=False, repr=False)

    def module_name(self, layer: int, part: str) -> str:
        """Full module path, as adapter files write it: `model.layers.3.self_attn.q_proj`."""
        return f"model.layers.{layer}.{part}"

    @cached_property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Full path of each linear layer in the blocks -> weight shape `(out, in)`."""
        return {
            self.module_name(layer, part.name): (part.out_features, linear.in_features)
            for layer in range(self.num_layers)
            for linear in self.linears
            for part in linear.parts
        }

    @cached_property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """`module_shapes`, the head, and the embedding, which is taken for a linear layer over
        token ids: `(out, in)` is `(hidden, vocab)`."""
        return {
            **self.module_shapes,
            EMBEDDING: (self.hidden_size, self.vocab_size),
            HEAD: (self.vocab_size, self.hidden_size),
        }

    @cached_property
    def norm_sizes(self) -> dict[str, int]:
        """Full path of each norm -> the size of its weight."""
        in_blocks = {
            self.module_name(layer, norm.name): norm.size
            for layer in range(self.num_layers)
            for norm in self.norms
        }
        return {**in_blocks, FINAL_NORM: self.hidden_size}

    @cached_property
    def biased_modules(self) -> frozenset[str]:
        """Full paths of the linear layers that have a bias in the base."""
        return frozenset(
            self.module_name(layer, part.name)
            for layer in range(self.num_layers)
            for linear in self.linears
            if linear.bias
            for part in linear.parts
        )

    def weight(self, module: str) -> Tensor:
        """A module's weight as it is served, in float32: `[out, in]`, `[vocab, hidden]` of both the
        embedding and the head, `[size]` of a norm."""
        name = EMBEDDING if module == HEAD and self.tied else module
        return self._read(f"{name}.weight")

    def bias(self, module: str) -> Tensor | None:
        """A linear layer's bias, `[out]` in float32; None where the base has none."""
        return self._read(f"{module}.bias") if module in self.biased_modules else None

    def _read(self, name: str) -> Tensor:
        if self.weights is None:
            raise RuntimeError(f"The base model's weights are not at hand, and {name} is needed.")
        return self.weights.read(name)
