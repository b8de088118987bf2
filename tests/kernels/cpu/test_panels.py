"""How our own products have their weights packed."""

from __future__ import annotations

import pytest
import torch

from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.panels import PANEL, PanelPacking

SHAPES = [(1, 2), (7, 6), (32, 2), (33, 34), (184, 60), (960, 576)]


def packing_of(ours: Bfloat16Kernels, shape: tuple[int, int]) -> PanelPacking:
    return PanelPacking(ours._pool, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_entry_lies_where_the_layout_says_and_the_rest_is_zero(
    ours: Bfloat16Kernels, shape: tuple[int, int]
) -> None:
    packing = packing_of(ours, shape)
    weight = torch.randn(shape).bfloat16()
    memory = packing.memory(packing.pack(weight))
    assert len(memory) == -(-shape[0] // PANEL) * PANEL * shape[1]
    places = packing.layout.places(torch.arange(shape[0])[:, None], torch.arange(shape[1]))
    assert len(places.unique()) == weight.numel()
    assert torch.equal(memory[places], weight)
    memory[places] = 0.0
    assert not memory.any(), "the padding is not zero"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_gives_every_bit_back(ours: Bfloat16Kernels, shape: tuple[int, int]) -> None:
    packing = packing_of(ours, shape)
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    unpacked = packing.unpack(packing.pack(bits.view(torch.bfloat16)))
    assert torch.equal(unpacked.view(torch.int16), bits)


def test_a_weight_that_is_a_view_is_packed_as_it_reads(ours: Bfloat16Kernels) -> None:
    weight = torch.randn(50, 90).bfloat16().t()[3:80, ::5]
    packing = packing_of(ours, (77, 10))
    assert torch.equal(packing.unpack(packing.pack(weight)), weight)
