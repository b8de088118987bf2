"""Attention over KV pages of any format in Triton, against the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_selection import FULL, SnapKV, Window, XAttention
from polydelta.kernels.ops import SequenceSlice
from polydelta.kernels.triton.kv_attention import TritonKVAttention

Pair = Callable[..., Any]
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_format_one_row_and_many_behind_pages_and_in_their_midst(
    kv_pair: Pair, format: str
) -> None:
    """What nobody has written is NaN, and pages lie in any order."""
    pair = kv_pair(format, [1, 22, 14], heads=5, kv_heads=1, head_dim=40)
    pair.fill((1, 0, 16, FULL), (2, 0, 3, FULL))
    pair.check((1, 16, 18, FULL), (0, 0, 1, FULL), (2, 3, 10, FULL))
    pair.check((1, 18, 19, FULL), (2, 10, 11, FULL))
    assert torch.equal(pair.plain.memory.pages, pair.triton.memory.pages)


@pytest.mark.parametrize("format", ["fp8", "mustafar-70", "kivi-4", "gear"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_models_dtypes(kv_pair: Pair, format: str, dtype: torch.dtype) -> None:
    pair = kv_pair(format, [17, 9], dtype=dtype, heads=3, kv_heads=3, head_dim=16)
    pair.fill((0, 0, 13, FULL), (1, 0, 8, FULL))
    pair.check((0, 13, 15, FULL), (1, 8, 9, FULL))


def test_outliers_of_a_head_whose_places_take_two_bytes(kv_pair: Pair) -> None:
    pair = kv_pair("gear", [5, 9], heads=2, kv_heads=1, head_dim=264)
    pair.fill((0, 0, 4, FULL), (1, 0, 7, FULL))
    pair.check((0, 4, 5, FULL), (1, 7, 9, FULL))


@pytest.mark.parametrize("format", ["native", "kivi-2"])
@pytest.mark.parametrize(
    ("selection", "window"),
    [(Window(3, 6), None), (Window(0, 1), None), (FULL, 5), (Window(2, 7), 4), (Window(9, 2), 12)],
    ids=str,
)
def test_what_windows_leave_of_a_context(
    kv_pair: Pair, format: str, selection: Any, window: int | None
) -> None:
    pair = kv_pair(format, [31, 12], selection, window=window, kv_heads=1)
    pair.fill((0, 0, 20, selection))
    pair.check((0, 20, 29, selection), (1, 0, 11, selection))
    pair.check((0, 29, 30, selection), (1, 11, 12, selection))


def test_pages_that_a_window_leaves_behind_are_not_asked_for(kv_pair: Pair) -> None:
    selection = Window(sinks=3, recent=4)
    pair = kv_pair("int8", [40])
    pair.fill((0, 0, 33, selection))
    for trial in (pair.plain, pair.triton):
        for block in range(3 // trial.size + 1, (33 + 1 - selection.recent) // trial.size):
            trial.pages[0][block] = -1
    assert pair.triton.pages[0].count(-1) > 2
    pair.check((0, 33, 39, selection))
    pair.check((0, 39, 40, selection))


@pytest.mark.parametrize(
    ("format", "selection"), [("int8", FULL), ("kivi-4", Window(270, 300))], ids=str
)
def test_contexts_of_several_chunks(kv_pair: Pair, format: str, selection: Any) -> None:
    pair = kv_pair(format, [700], selection, heads=2, kv_heads=1, page_tokens=30)
    pair.fill((0, 0, 699, selection))
    pair.check((0, 699, 700, selection))


def test_prompts_of_several_tiles(kv_pair: Pair) -> None:
    """32 rows of a tile are 10 tokens of 3 heads, and two rows more."""
    pair = kv_pair("int4", [75], heads=3, kv_heads=1, page_tokens=20)
    pair.fill((0, 0, 30, FULL))
    pair.check((0, 30, 75, FULL))


def test_slices_of_one_step_each_see_what_their_own_window_leaves(kv_pair: Pair) -> None:
    pair = kv_pair("int8", [20, 20, 20, 20])
    pair.fill(*((number, 0, 15, FULL) for number in range(4)))
    pair.check((3, 15, 16, Window(2, 3)), (0, 15, 18, Window(0, 4)), (2, 15, 16, FULL))


def test_tokens_are_evicted_behind_the_attention(kv_pair: Pair) -> None:
    selection = SnapKV(33)
    pair = kv_pair("int8", [40], selection, kv_heads=1)
    pair.check((0, 0, 40, selection))
    assert torch.equal(pair.plain.memory.pages, pair.triton.memory.pages)


def test_prompts_by_blocks_are_read_by_torch(kv_pair: Pair) -> None:
    pair = kv_pair("native", [150, 9], kv_heads=1, page_tokens=30)
    pair.fill((1, 0, 8, FULL))
    pair.check((0, 0, 150, XAttention()), (1, 8, 9, FULL))


def test_pages_in_host_ram_are_refused(kv_pair: Pair) -> None:
    pair = kv_pair("native", [20], host_pages=3)
    with pytest.raises(ValueError, match="KV pages in host RAM cannot be read by a GPU"):
        pair.check((0, 0, 20, FULL))


def test_queries_of_another_dtype_are_refused(kv_pair: Pair) -> None:
    pair = kv_pair("int8", [5])
    pair.triton.queries[0] = pair.triton.queries[0].double()
    with pytest.raises(ValueError, match=r"queries are torch\.float64"):
        pair.check((0, 0, 5, FULL))


@pytest.mark.parametrize("format", ["int4", "kivi-4"])
def test_parts_of_a_fused_projection_are_read_in_place(
    kv_pair: Pair, device: torch.device, format: str
) -> None:
    pair = kv_pair(format, [6], page_tokens=8)
    trial = pair.triton
    fused = torch.cat((trial.queries[0], trial.keys[0], trial.values[0]), 1).to(device)
    part = SequenceSlice(0, 6, 6, trial.pages[0], FULL, 0)
    attention = TritonKVAttention(trial.kind, device)
    opened = None if trial.memory.open is None else trial.memory.open.to(device)
    memory = type(trial.memory)(trial.memory.pages.to(device), opened)
    out = attention.attend(
        attention.plan([part]), 0, memory, fused[:, :4], fused[:, 4:6], fused[:, 6:]
    )
    (wanted,) = pair.plain.step([(0, 0, 6, FULL)])
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-5, atol=1e-5)
