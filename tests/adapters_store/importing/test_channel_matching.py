from __future__ import annotations

import pytest
import torch

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.importing.channel_matching import (
    match_channels,
    match_heads,
    rows_of,
)

GROUP, KV_HEADS, HEAD_DIM, HIDDEN = 3, 4, 5, 7


def test_an_order_of_rows_is_found() -> None:
    base, order = torch.randn(11, 3), torch.randperm(11)
    assert torch.equal(match_channels("gate", base, base[order]), order)


def test_rows_that_are_alike_are_taken_once_each() -> None:
    base = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]])
    tuned = torch.tensor([[-0.0], [1.0], [1.0], [0.0], [1.0]])
    assert match_channels("gate", base, tuned).tolist() == [1, 0, 2, 3, 4]


def test_rows_that_the_base_has_not_are_counted() -> None:
    base = torch.randn(11, 3)
    tuned = base.clone()
    tuned[[2, 5]] += 1e-3
    with pytest.raises(InvalidAdapterError, match="2 of 11 in the rows of gate of the tuned model"):
        match_channels("the rows of gate", base, tuned)
    doubled = base[[0, 0, *range(2, 11)]]
    with pytest.raises(InvalidAdapterError, match="1 of 11 in gate"):
        match_channels("gate", base, doubled)


def heads() -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.randn(KV_HEADS * GROUP * HEAD_DIM, HIDDEN),
        torch.randn(KV_HEADS * HEAD_DIM, HIDDEN),
    )


def test_query_heads_are_found_within_the_group_that_their_key_head_has_moved_with() -> None:
    q, k = heads()
    kv_order = torch.randperm(KV_HEADS)
    order = torch.cat([kv * GROUP + torch.randperm(GROUP) for kv in kv_order])
    tuned = q[rows_of(order, HEAD_DIM)], k[rows_of(kv_order, HEAD_DIM)]
    found, kv_found = match_heads("heads", (q, k), tuned, KV_HEADS)
    assert torch.equal(found, order)
    assert torch.equal(kv_found, kv_order)


def test_key_heads_that_are_alike_are_told_apart_by_who_reads_them() -> None:
    q, _ = heads()
    k = torch.zeros(KV_HEADS * HEAD_DIM, HIDDEN)
    order = torch.arange(KV_HEADS * GROUP).view(KV_HEADS, GROUP).flip(0).flatten()
    found, kv_found = match_heads("heads", (q, k), (q[rows_of(order, HEAD_DIM)], k), KV_HEADS)
    assert torch.equal(found, order)
    assert kv_found.tolist() == [3, 2, 1, 0]


def test_a_query_head_that_has_left_its_group_is_refused() -> None:
    q, k = heads()
    order = torch.arange(KV_HEADS * GROUP)
    order[[0, GROUP]] = order[[GROUP, 0]]
    with pytest.raises(InvalidAdapterError, match="2 of 4 in the heads"):
        match_heads("the heads", (q, k), (q[rows_of(order, HEAD_DIM)], k), KV_HEADS)
