from __future__ import annotations

import pytest
import torch

from polydelta.engine.gpu_memory import RESERVE, largest_step, share_for_pool
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.weights import Weights
from polydelta.kernels.reference import ReferenceKernels

GIB = 1 << 30


def test_the_pool_gets_what_nobody_else_has() -> None:
    assert share_for_pool(80 * GIB, 1 * GIB, 20 * GIB, 0.9) == 51 * GIB - RESERVE


def test_a_gpu_that_is_too_small_is_refused_with_a_remedy() -> None:
    with pytest.raises(ModelError, match=r"16\.0 GiB, 50% .* Raise gpu_memory_utilization"):
        share_for_pool(16 * GIB, GIB, 8 * GIB, 0.5)


class CountingKernels(ReferenceKernels):
    """Notes how many rows the attention and the head are given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.samples = 0

    def attention(self, plan, queries, kv):
        self.rows.append(len(queries))
        return super().attention(plan, queries, kv)

    def head(self, weight):
        head = super().head(weight)

        def counted(x: torch.Tensor) -> torch.Tensor:
            self.samples = len(x)
            return head(x)

        return counted


def test_the_largest_step_runs_through_every_layer(tiny_checkpoint: Checkpoint) -> None:
    kernels = CountingKernels()
    weights = Weights(tiny_checkpoint.tensors, torch.float32, lambda done, total: None)
    config = tiny_checkpoint.config
    decoder = Decoder(config, weights, kernels, config.context_length, torch.float32)
    spec = KVSpec.of(config, torch.float32, 16)
    largest_step(decoder, kernels, spec, rows=77, samples=5)
    assert kernels.rows == [77] * config.num_layers
    assert kernels.samples == 5
    kernels.rows.clear()
    largest_step(decoder, kernels, spec, rows=10**6, samples=1)
    assert kernels.rows == [config.context_length] * config.num_layers
