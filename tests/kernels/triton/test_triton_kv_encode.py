"""Tokens that are encoded each by itself have the bytes that the format says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.triton.kv_encode import encode
from polydelta.kernels.triton.kv_pages import pages_of

Trial = Callable[..., Any]
BY_TOKEN = sorted(name for name, make in FORMATS.items() if not make().by_page)


def check(trial: Any, device: torch.device, keys: Tensor, values: Tensor) -> None:
    """Into scattered places, by both; keys, values: `[tokens, kv_heads, head_dim]`."""
    kind, memory = trial.kind, trial.memory
    places = torch.randperm(len(memory.pages) * trial.size)[: len(keys)]
    got = memory.pages.to(device, copy=True)
    rows = (keys.to(device), values.to(device))
    encode(pages_of(kind, got.stride(0)), got, *rows, places.to(device))
    for name, part in kind.format.encode(keys[:, None], values[:, None]).items():
        section = kind.layout.view(memory.pages, name)
        section[places // trial.size, places % trial.size] = part[:, 0]
    assert torch.equal(got.cpu(), memory.pages)


@pytest.mark.parametrize("format", BY_TOKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_random_rows(
    kv_trial: Trial, device: torch.device, format: str, dtype: torch.dtype
) -> None:
    trial = kv_trial(format, [20], dtype=dtype, kv_heads=2, head_dim=40)
    torch.manual_seed(0)
    size = 10 ** torch.linspace(-6, 3, 9)[:, None, None]
    keys, values = ((torch.randn(9, 2, 40) * size).to(dtype) for _ in range(2))
    check(trial, device, keys, values)


@pytest.mark.parametrize("format", BY_TOKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_equal_numbers_of_zeros_and_of_what_is_not_finite(
    kv_trial: Trial, device: torch.device, format: str, dtype: torch.dtype
) -> None:
    trial = kv_trial(format, [20], dtype=dtype, kv_heads=1, head_dim=16)
    zero, one = torch.zeros(1, 16), torch.ones(1, 16)
    steps = torch.arange(16.0)[None]
    odd = steps.clone()
    odd[0, [2, 5, 7]] = torch.tensor([math.nan, math.inf, -math.inf])
    huge = torch.cat((steps * 1e36, -steps * 1e7))
    rows = torch.cat((zero, one, -3 * one, steps % 3, -(steps % 2), odd, huge, steps * 1e-9))
    keys = rows[:, None].to(dtype)
    check(trial, device, keys, keys.flip(0))


def test_fp8_rounds_halves_to_even_codes(kv_trial: Trial, device: torch.device) -> None:
    """All numbers between neighbouring codes, small ones that have no exponent of their own too."""
    trial = kv_trial("fp8", [20], dtype=torch.float32, kv_heads=1, head_dim=64)
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    # The largest of a row is 448: its scale is 1.
    rows = torch.cat((codes[:126], middles)).view(4, 63)
    rows = torch.cat((rows, torch.full((4, 1), 448.0)), 1)[:, None]
    check(trial, device, rows, -rows)


def test_rows_without_a_place_are_stored_nowhere(kv_trial: Trial, device: torch.device) -> None:
    trial = kv_trial("int4", [20], dtype=torch.float32)
    pages = trial.memory.pages.to(device)
    keys = torch.randn(2, 2, 16, device=device)
    before = pages.clone()
    encode(pages_of(trial.kind, pages.stride(0)), pages, keys, keys, torch.tensor([-1, -7]))
    assert torch.equal(pages, before)


def test_pages_may_lie_apart(kv_trial: Trial, device: torch.device) -> None:
    trial = kv_trial("int8", [20], dtype=torch.float32)
    pages = trial.memory.pages
    wide = torch.full((len(pages), pages.shape[1] + 64), 7, dtype=torch.uint8, device=device)
    keys, places = torch.randn(3, 2, 16, device=device), torch.tensor([5, 0, 9], device=device)
    apart = wide[:, : pages.shape[1]]
    apart.copy_(pages)
    encode(pages_of(trial.kind, apart.stride(0)), apart, keys, -keys, places)
    dense = pages.to(device)
    encode(pages_of(trial.kind, dense.stride(0)), dense, keys, -keys, places)
    assert torch.equal(apart, dense)
    assert (wide[:, pages.shape[1] :] == 7).all()
