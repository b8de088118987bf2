"""Bytes of adapters into scattered pages, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from polydelta.kernels.page_writing import write_pages
from polydelta.kernels.triton.adapter_copy import AdapterCopier, in_one_piece

PAGE_BYTES = 64 * 3
JUNK = 0xA5


def layers_of(sizes: Sequence[int], together: bool) -> list[Tensor]:
    data = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8)
    parts = data.split(list(sizes))
    return list(parts) if together else [part.clone() for part in parts]


@pytest.mark.parametrize("together", [True, False], ids=["in one piece", "apart"])
@pytest.mark.parametrize("sizes", [(64 * 7, 64 * 9, 64), (0, 64 * 9, 64 * 8), (64 * 9, 0, 0)])
def test_every_page_holds_its_part_and_nothing_else_changes(
    sizes: tuple[int, ...], together: bool, device: torch.device
) -> None:
    torch.manual_seed(1)
    pages = [5, 0, 3]
    layers = layers_of(sizes, together)
    expected = torch.full((3, 7, PAGE_BYTES), JUNK, dtype=torch.uint8)
    write_pages(expected, pages, layers)
    storage = torch.full((3, 7, PAGE_BYTES), JUNK, dtype=torch.uint8, device=device)
    AdapterCopier(device).write_pages(storage, pages, layers)
    assert torch.equal(storage.cpu(), expected)


def test_an_adapter_without_bytes_writes_nothing(device: torch.device) -> None:
    storage = torch.full((2, 4, PAGE_BYTES), JUNK, dtype=torch.uint8, device=device)
    AdapterCopier(device).write_pages(storage, [1], layers_of((0, 0), True))
    assert bool((storage == JUNK).all())


def test_neighbours_are_one_piece_without_a_copy() -> None:
    for sizes in ((64, 0, 128), (0, 64, 128)):
        layers = layers_of(sizes, True)
        whole = in_one_piece(layers)
        assert whole.data_ptr() == max(layers[:2], key=len).data_ptr()
        assert torch.equal(whole, torch.cat(layers))
    apart = layers_of((64, 64, 128), False)
    assert torch.equal(in_one_piece(apart), torch.cat(apart))
