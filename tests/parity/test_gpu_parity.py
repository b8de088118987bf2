"""Greedy answers by Triton's kernels beside those of the CPU's, for all kinds of delta."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_figures import Figure
from benchmarks.gpu_parity import BLOCK_SIZE, RECORDABLE, SUMS, compare, made_adapters
from benchmarks.gpu_setup import FULL, QUICK
from polydelta.adapters_store.delta_kinds import KINDS, NOT_SERVED
from polydelta.adapters_store.packing import pack
from polydelta.engine.deltas import AdapterSegment, StepDeltas
from polydelta.engine.kv_spec import kv_page_bytes
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.pool_adapter import PoolAdapter


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


def test_a_batch_of_what_is_called_recordable_is_recorded() -> None:
    from polydelta.kernels.triton.kernels import TritonKernels

    model, kernels = QUICK.parity_model, TritonKernels(torch.device("cpu"))
    layout = base_layout(model, "made")
    storage = kernels.zeros(model.num_layers, 64, kv_page_bytes(model, BLOCK_SIZE, torch.float32))
    for name, adapter in made_adapters(layout).items():
        packed = pack(adapter, layout, torch.float32)
        pages = range(-(-packed.bytes_per_layer // storage.shape[-1]))
        bound = PoolAdapter(packed, storage, pages, kernels)
        deltas = StepDeltas(kernels)
        deltas.begin([AdapterSegment(0, 1, bound)])
        recorded = deltas.only_outputs and deltas.group is not None and deltas.group.recordable
        assert recorded or name not in RECORDABLE, name
