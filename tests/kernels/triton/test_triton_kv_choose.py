"""What queries choose to read, against the choices of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polydelta.kernels.kv_selection import FULL, DoubleSparsity, InfLLM, Quest, Window

Pair = Callable[..., Any]
SELECTIONS = [Quest(13), DoubleSparsity(7)]


@pytest.mark.parametrize("format", ["native", "int8", "kivi-2", "gear"])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_answers_read_what_they_choose(kv_pair: Pair, format: str, selection: Any) -> None:
    """Contexts that need no choice among them, and sequences that read everything."""
    pair = kv_pair(format, [47, 26, 9, 30], selection, heads=3, kv_heads=1)
    starts = [44, 23, 5, 26]
    pair.fill(*((number, 0, start, FULL) for number, start in enumerate(starts)))
    for step in range(2):
        reads = [FULL, selection, selection, selection]
        pair.check(
            *(
                (number, starts[number] + step, starts[number] + step + 1, reads[number])
                for number in (1, 3, 0, 2)
            )
        )


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_choices_in_the_models_dtypes(kv_pair: Pair, selection: Any, dtype: torch.dtype) -> None:
    pair = kv_pair("int8", [50], selection, dtype=dtype, heads=6, kv_heads=3)
    pair.fill((0, 0, 49, FULL))
    pair.check((0, 49, 50, selection))


@pytest.mark.parametrize("selection", [Quest(12), DoubleSparsity(6)], ids=str)
def test_equal_scores_go_to_the_lower_position(kv_pair: Pair, selection: Any) -> None:
    pair = kv_pair("native", [60], selection, whole_numbers=True)
    for trial in (pair.plain, pair.triton):
        trial.keys[0][:] = trial.keys[0][:1]
    pair.fill((0, 0, 59, FULL))
    pair.check((0, 59, 60, selection))


def test_requests_choose_with_budgets_of_their_own(kv_pair: Pair) -> None:
    pair = kv_pair("int8", [40, 40, 40], Quest(8))
    pair.fill(*((number, 0, 39, FULL) for number in range(3)))
    pair.check((0, 39, 40, Quest(8)), (1, 39, 40, Quest(20)), (2, 39, 40, Window(1, 9)))


@pytest.mark.parametrize(("layer", "window"), [(0, None), (1, None), (2, 11)])
def test_first_layers_and_those_with_windows_choose_nothing(
    kv_pair: Pair, layer: int, window: int | None
) -> None:
    pair = kv_pair("native", [40], Quest(8), layer=layer, window=window)
    pair.fill((0, 0, 39, FULL))
    pair.check((0, 39, 40, Quest(8)))


@pytest.mark.parametrize("selection", [Quest(300), DoubleSparsity(300)], ids=str)
def test_choices_of_several_chunks_among_blocks_of_several_programs(
    kv_pair: Pair, selection: Any
) -> None:
    pair = kv_pair("native", [700], selection, heads=2, kv_heads=1)
    pair.fill((0, 0, 699, FULL))
    pair.check((0, 699, 700, selection))


def test_infllm_chooses_in_torch(kv_pair: Pair) -> None:
    selection = InfLLM(4, 6, 8)
    pair = kv_pair("int8", [45, 20], selection)
    pair.fill((0, 0, 43, FULL), (1, 0, 19, FULL))
    pair.check((1, 19, 20, FULL), (0, 43, 44, selection))


def test_a_sequence_gets_the_same_bits_whoever_shares_its_batch(kv_pair: Pair) -> None:
    together, alone = (kv_pair("int8", [30, 9, 21], Quest(8)) for _ in range(2))
    parts = (0, 29, 30, Quest(8)), (1, 8, 9, FULL), (2, 20, 21, Quest(8))
    for pair in (together, alone):
        pair.fill(*((number, 0, first, FULL) for number, first, _, _ in parts))
    for part, out in zip(parts, together.check(*parts), strict=True):
        assert torch.equal(alone.check(part)[0], out)
