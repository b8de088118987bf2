"""Greedy answers by Triton's kernels beside those of the CPU's, for all kinds of delta."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_figures import Figure
from benchmarks.gpu_parity import RECORDABLE, SUMS, compare, made_adapters
from benchmarks.gpu_setup import FULL, QUICK
from polydelta.adapters_store.delta_kinds import KINDS, NOT_SERVED
from polydelta.engine.models.decoder import base_layout


def check(figures: list[Figure]) -> None:
    assert len(figures) == len(SUMS) + len(RECORDABLE) + 1
    differing = [f"{one.name}: {one.facts}" for one in figures[:-1] if not one.agrees]
    assert differing == []
    like_base = [one.name for one in figures[:-1] if one.facts["as_base"]]
    assert len(like_base) <= 2 + len(SUMS) // 4, "most adapters change nothing"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no NVIDIA GPU")
def test_a_gpu_gives_the_cpus_answers_with_all_kinds_of_delta() -> None:
    from polydelta.kernels.triton.kernels import TritonKernels

    kernels = TritonKernels(torch.device("cuda"))
    check(compare(kernels, FULL.parity_model, FULL.parity_tokens))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels do not take CPU tensors")
def test_tritons_interpreter_gives_the_cpus_answers_with_all_kinds_of_delta() -> None:
    from polydelta.kernels.triton.kernels import TritonKernels

    kernels = TritonKernels(torch.device("cpu"))
    check(compare(kernels, QUICK.parity_model, QUICK.parity_tokens))


def test_all_kinds_that_are_served_are_compared() -> None:
    adapters = made_adapters(base_layout(QUICK.parity_model, "made")).values()
    assert {kind for adapter in adapters for kind in adapter.kinds} == set(KINDS) - NOT_SERVED
