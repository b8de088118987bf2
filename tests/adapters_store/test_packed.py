"""What is known of a packed adapter, whatever kinds of deltas are in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

import pytest
import torch

from polydelta.adapters_store.base_layout import EMBEDDING, FINAL_NORM, HEAD, MODEL, BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Delta,
    Invocation,
    NormWeight,
    Prefix,
    Prompt,
    TokenRows,
)
from polydelta.adapters_store.delta_kinds import KINDS, NOT_SERVED
from polydelta.adapters_store.packed_deltas import PackedDelta
from polydelta.adapters_store.packing import pack

Makers = Mapping[str, Callable[[tuple[int, int]], Delta]]


def adapter_of(modules: Mapping[str, tuple[Delta, ...]]) -> Adapter:
    return Adapter("id", 1, "digest", "TEST", modules)


def everything(layout: BaseLayout, makers: Makers) -> dict[str, dict[str, tuple[Delta, ...]]]:
    """What adapters change, by name: all that there can be, each alone."""
    module = "model.layers.1.self_attn.k_proj"
    shape = layout.module_shapes[module]
    tokens = {
        f"{kind} of {place}": {place: (makers[kind](layout.target_shapes[place]),)}
        for kind in ("low rank", "output scale", "bias")
        for place in (EMBEDDING, HEAD)
    }
    rows = TokenRows(torch.tensor([3, 7, 39]), torch.randn(3, layout.hidden_size))
    virtual = torch.randn(layout.num_layers, 2, 5, layout.num_kv_heads, layout.head_dim)
    return {
        **{kind: {module: (make(shape),)} for kind, make in makers.items()},
        **tokens,
        "rows of tokens": {EMBEDDING: (rows,), HEAD: (rows,)},
        "norm": {"model.layers.2.input_layernorm": (NormWeight(torch.randn(36)),)},
        "last norm": {FINAL_NORM: (NormWeight(torch.randn(36)),)},
        "prefix": {MODEL: (Prefix(virtual),)},
        "prompt": {MODEL: (Prompt(torch.randn(7, layout.hidden_size)),)},
        "invocation": {MODEL: (Invocation((3, 7)),)},
    }


def test_these_are_all_kinds_that_there_are(layout: BaseLayout, delta_makers: Makers) -> None:
    adapters = [adapter_of(modules) for modules in everything(layout, delta_makers).values()]
    assert {kind for adapter in adapters for kind in adapter.kinds} == set(KINDS) - NOT_SERVED
    layers = [layer for a in adapters for layer in pack(a, layout, torch.float32).layers]
    packed = {type(delta) for layer in layers for delta in layer.deltas}
    assert packed == set(get_args(PackedDelta))


def test_only_matrices_that_go_into_a_linear_layers_weight_are_fused(
    layout: BaseLayout, delta_makers: Makers
) -> None:
    cases = everything(layout, delta_makers)
    ((module, low_rank),) = cases["low rank"].items()
    beside = {
        f"{name} beside low rank": modules | {module: low_rank + modules.get(module, ())}
        for name, modules in cases.items()
    }
    fusable = {
        name
        for name, modules in {**cases, **beside}.items()
        if pack(adapter_of(modules), layout, torch.float32).fusable
    }
    plain = {"low rank", "sparse"}
    assert fusable == plain | {f"{name} beside low rank" for name in plain}


@pytest.mark.parametrize("kind", [Prefix, Prompt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_virtual_tokens_are_kept_in_one_piece_of_the_adapters_dtype(
    layout: BaseLayout, kind: type[Prefix] | type[Prompt], dtype: torch.dtype
) -> None:
    # As a transposed view, which is what some files give.
    values = torch.randn((12, 1, 5, 2, 3) if kind is Prefix else (36, 7)).permute(
        *((4, 3, 2, 1, 0) if kind is Prefix else (1, 0))
    )
    packed = pack(adapter_of({MODEL: (kind(values),)}), layout, dtype)
    assert packed.prefix is not None
    assert packed.prefix.embedded == (kind is Prompt)
    assert packed.prefix.values.is_contiguous()
    assert torch.equal(packed.prefix.values, values.to(dtype))
    assert packed.traits.num_prefix_tokens == (5 if kind is Prefix else 7)
    assert packed.nbytes == values.numel() * dtype.itemsize
    assert packed.bytes_per_layer == 0


def test_an_invocation_is_kept_beside_what_it_switches_on(
    layout: BaseLayout, delta_makers: Makers
) -> None:
    modules = everything(layout, delta_makers)
    packed = pack(adapter_of(modules["low rank"] | modules["invocation"]), layout, torch.float32)
    assert packed.traits.invocation == packed.invocation == (3, 7)
    assert packed.bytes_per_layer > 0
