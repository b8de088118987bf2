"""Where deltas are said to lie, against where they lie in the bytes of a packed adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear, LinearPart
from polydelta.adapters_store.delta import Adapter, Bias, Columns, Delta, LowRank, Scale, Side
from polydelta.adapters_store.packing import pack
from polydelta.engine.adapter_places import LINEARS_PER_LAYER, adapter_places
from polydelta.engine.linear_deltas import bind_layer
from polydelta.kernels.delta_groups import SitePlaces
from polydelta.kernels.reference import ReferenceKernels

HIDDEN, LAYERS = 20, 3
LAYOUT = BaseLayout(
    "blocks", LAYERS,
    (
        FusedLinear("qkv", HIDDEN, (LinearPart("q", 24), LinearPart("k", 8)), True),
        FusedLinear("o", 24, (LinearPart("o", HIDDEN),), True),
    ),
    (), hidden_size=HIDDEN, vocab_size=11, num_kv_heads=1, head_dim=8,
)  # fmt: skip
STORAGE = torch.zeros(LAYERS, 50, 192, dtype=torch.uint8)
PAGES = list(range(7, 47))


class Recorder(ReferenceKernels):
    """Binds nothing: what it is given is kept."""

    def add_delta(self, weights: Any) -> Any:
        return weights

    def change_output(self, weights: Any) -> Any:
        return weights


def low_rank(out: int, in_features: int) -> LowRank:
    return LowRank(torch.randn(3, in_features), torch.randn(out, 3))


def adapter() -> Adapter:
    """Nothing in the layer between."""
    modules: dict[str, tuple[Delta, ...]] = {
        LAYOUT.module_name(0, "q"): (low_rank(24, HIDDEN), Bias(torch.randn(24))),
        LAYOUT.module_name(0, "k"): (low_rank(8, HIDDEN), Scale(torch.randn(8), Side.OUTPUT)),
        LAYOUT.module_name(2, "o"): (
            Columns(24, torch.tensor([3, 9]).int(), torch.randn(HIDDEN, 2)),
            Scale(torch.randn(24), Side.INPUT),
        ),
    }
    return Adapter("a", 1, "digest", "LORA", modules)


def tensors(weights: Any) -> Iterator[Tensor]:
    """In a fixed order."""
    if isinstance(weights, Tensor):
        yield weights
    elif isinstance(weights, list | tuple):
        for item in weights:
            yield from tensors(item)
    elif is_dataclass(weights):
        for field in fields(weights):
            yield from tensors(getattr(weights, field.name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_are_those_of_the_bytes(dtype: torch.dtype) -> None:
    packed = pack(adapter(), LAYOUT, dtype)
    places = adapter_places([layer.deltas for layer in packed.layers], dtype, STORAGE, PAGES)
    assert places.pages == PAGES
    assert places.dtype == dtype
    assert places.storage is STORAGE
    seen = 0
    for layer, content in enumerate(packed.layers):
        bound = bind_layer(content, dtype, Recorder())
        for index in range(LINEARS_PER_LAYER):
            site = places.sites[layer * LINEARS_PER_LAYER + index]
            output = bound.linears[index].output if index in bound.linears else None
            expected = list(tensors([output.changes, output.adds, output.biases])) if output else []
            if site is None:
                assert expected == []
                continue
            assert site.layer == layer
            got = list(tensors([site.changes, site.adds, site.biases]))
            assert len(got) == len(expected)
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.is_meta
                assert ours.shape == theirs.shape
                assert ours.dtype == theirs.dtype
                assert ours.stride() == theirs.stride()
                assert ours.storage_offset() == theirs.storage_offset()
                seen += 1
    assert seen


def test_sites_are_by_layer_and_linear() -> None:
    packed = pack(adapter(), LAYOUT, torch.float32)
    deltas = [layer.deltas for layer in packed.layers]
    sites = adapter_places(deltas, torch.float32, STORAGE, PAGES).sites
    assert len(sites) == LAYERS * LINEARS_PER_LAYER
    assert [number for number, site in enumerate(sites) if site] == [0, 2 * LINEARS_PER_LAYER + 1]


def test_layers_with_the_same_deltas_share_their_places() -> None:
    first, *_ = pack(adapter(), LAYOUT, torch.float32).layers
    sites = adapter_places([first.deltas] * 3, torch.float32, STORAGE, PAGES).sites
    each = [site for site in sites if isinstance(site, SitePlaces)]
    assert [site.layer for site in each] == [0, 1, 2]
    assert len({id(site.adds) for site in each}) == 1
