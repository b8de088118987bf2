"""Keys and values end up where the reference puts them, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from polydelta.kernels.reference import ReferenceKernels
from polydelta.kernels.triton.kv_store import store_kv


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 2), (2, 10), (3, 80), (8, 128), (9, 256)])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_every_token_gets_its_slot(
    device: torch.device, kv_heads: int, head_dim: int, block_size: int
) -> None:
    tokens = 9
    kv = torch.randn(12, 2, block_size, kv_heads, head_dim)
    slots = torch.randperm(12 * block_size)[:tokens]
    keys, values = torch.randn(2, tokens, kv_heads, head_dim)
    expected = kv.clone()
    ReferenceKernels().store_kv(expected, keys, values, slots)
    got = kv.to(device)
    store_kv(got, keys.to(device), values.to(device), slots.to(device))
    assert torch.equal(got.cpu(), expected)


def test_slots_below_zero_are_stored_nowhere(device: torch.device) -> None:
    kv = torch.randn(3, 2, 4, 2, 16)
    keys, values = torch.randn(2, 3, 2, 16)
    got = kv.to(device)
    store_kv(got, keys.to(device), values.to(device), torch.tensor([-1, 5, -7], device=device))
    kv[1, 0, 1], kv[1, 1, 1] = keys[1], values[1]
    assert torch.equal(got.cpu(), kv)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_becomes_the_caches(
    device: torch.device, dtype: torch.dtype, cache: torch.dtype
) -> None:
    kv = torch.zeros(2, 2, 4, 2, 10, dtype=cache, device=device)
    keys, values = torch.randn(2, 2, 2, 10).to(dtype)
    slots = torch.tensor([6, 1])
    store_kv(kv, keys.to(device), values.to(device), slots.to(device))
    got = kv.transpose(1, 2).flatten(0, 1)[slots.to(device)].cpu()
    expected = torch.stack((keys, values), 1).to(cache)
    # Triton's interpreter cuts off what bfloat16 does not hold, the GPU rounds.
    torch.testing.assert_close(got, expected, rtol=2**-7 if cache == torch.bfloat16 else 0, atol=0)


def test_parts_of_a_fused_projection_are_read_in_place(device: torch.device) -> None:
    fused = torch.randn(5, 9, 16, device=device)
    kv = torch.zeros(1, 2, 8, 2, 16, device=device)
    slots = torch.tensor([4, 0, 7, 2, 1], device=device)
    store_kv(kv, fused[:, 5:7], fused[:, 7:], slots)
    assert torch.equal(kv[0, 0, slots], fused[:, 5:7])
    assert torch.equal(kv[0, 1, slots], fused[:, 7:])


def test_rows_that_are_not_dense_are_stored_too(device: torch.device) -> None:
    keys, values = torch.randn(2, 16, 3, 2, device=device).permute(0, 2, 3, 1)
    kv = torch.zeros(1, 2, 4, 2, 16, device=device)
    store_kv(kv, keys, values, torch.tensor([2, 0, 3], device=device))
    assert torch.equal(kv[0, 0, [2, 0, 3]], keys)
    assert torch.equal(kv[0, 1, [2, 0, 3]], values)


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    kv = torch.ones(1, 2, 4, 2, 16, device=device)
    nothing = torch.empty(0, 2, 16, device=device)
    store_kv(kv, nothing, nothing, torch.empty(0, dtype=torch.int64, device=device))
    assert torch.equal(kv, torch.ones_like(kv))
