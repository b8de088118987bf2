from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch

from polydelta.engine.gpu_memory import RESERVE, largest_steps, share_for_pool
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.weights import Weights
from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_selection import (
    BY_QUERY,
    FULL,
    H2O,
    DoubleSparsity,
    Quest,
    Selection,
    Window,
    XAttention,
)
from polydelta.kernels.ops import SequenceSlice
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


@pytest.fixture
def decoder(tiny_checkpoint: Checkpoint) -> Decoder:
    weights = Weights(tiny_checkpoint.tensors, torch.float32, lambda done, total: None)
    config = tiny_checkpoint.config
    return Decoder(config, weights, CountingKernels(), config.context_length, torch.float32)


def test_the_largest_step_runs_through_every_layer(decoder: Decoder) -> None:
    kernels, config = decoder.kernels, decoder.config
    spec = KVSpec.of(config, torch.float32, 16)
    largest_steps(decoder, kernels, spec, KVRules(), rows=77, samples=5)
    assert kernels.rows == [77] * config.num_layers
    assert kernels.samples == 5
    kernels.rows.clear()
    largest_steps(decoder, kernels, spec, KVRules(), rows=10**6, samples=1)
    assert kernels.rows == [config.context_length] * config.num_layers


@pytest.mark.parametrize(
    ("format", "selection", "prefill", "read"),
    [
        ("native", Window(4, 8), None, [Window(4, 8)]),
        ("native", H2O(), None, [H2O()]),
        ("native", FULL, XAttention(), [XAttention()]),
        ("native", Quest(9), None, [FULL, Quest(9)]),
        ("int8", Quest(9), XAttention(), [FULL, XAttention(), Quest(9)]),
        ("kivi-4", DoubleSparsity(7), None, [FULL, DoubleSparsity(7)]),
    ],
)
def test_what_the_server_reads_with_is_measured_too(
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    selection: Selection,
    prefill: XAttention | None,
    read: list[Selection],
) -> None:
    """Beside plain attention to a prompt; of answers that choose, one is as long as any can be."""
    config, seen = decoder.config, []
    attended = KVAttention._attended

    def noted(self: KVAttention, part: SequenceSlice, layer: int, *rest: Any) -> torch.Tensor:
        if not layer:
            seen.append(part)
        return attended(self, part, layer, *rest)

    monkeypatch.setattr(KVAttention, "_attended", noted)
    labels = torch.arange(2).expand(config.num_layers, config.num_kv_heads, 2)
    spec = KVSpec.of(config, torch.float32, 16, format, selection, labels)
    rules = KVRules(selection, prefill, format, spec.format.by_page)
    largest_steps(decoder, decoder.kernels, spec, rules, rows=77, samples=5)
    # Where the format is by page, a prompt is read page by page.
    assert [one for one, _ in groupby(part.selection for part in seen)] == read
    choosing = [part.context for part in seen if isinstance(part.selection, BY_QUERY)]
    assert choosing in ([], [config.context_length, 1, 1, 1, 1])
    assert max(part.context for part in seen if part.context not in choosing) == 77
