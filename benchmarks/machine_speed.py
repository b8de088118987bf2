"""How fast the machine reads and copies memory and multiplies matrices, with all of its threads."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.layers import fused_linears

# Bytes of the arrays that are read: many times what any L3 holds.
ARRAY_BYTES = 1 << 29
# Rows of the products: a prefill of 16 prompts of 128 tokens.
ROWS = 2048
# The best of so many turns, close together, counts.
TURNS = 5


@dataclass(frozen=True)
class MachineSpeed:
    # Bytes a second.
    read: float
    # Bytes read plus bytes written, a second.
    copy: float
    # Floating-point operations a second, of bfloat16 products with packed weights.
    matmul: float

    @property
    def memory(self) -> float:
        """Bytes a second, read or written, whichever way moves more."""
        return max(self.read, self.copy)

    def to_json(self) -> dict[str, Any]:
        return {
            "read_gb_per_second": round(self.read / 1e9, 1),
            "copy_gb_per_second": round(self.copy / 1e9, 1),
            "matmul_gflop_per_second": round(self.matmul / 1e9),
        }


def median_speed(speeds: Sequence[MachineSpeed]) -> MachineSpeed:
    """Of measurements between which the machine may have drifted."""
    return MachineSpeed(
        *(
            statistics.median(getattr(speed, each.name) for speed in speeds)
            for each in fields(MachineSpeed)
        )
    )


def measure_speed(model: ModelConfig) -> MachineSpeed:
    """In a process that ends: its OpenMP threads must not stand beside those of what is measured
    next."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(_measure, model).result()


def _measure(model: ModelConfig) -> MachineSpeed:
    # Written to, so that every page is a page of its own: untouched ones are all the same zeros.
    source = torch.ones(ARRAY_BYTES // 4)
    target = torch.ones_like(source)
    read = ARRAY_BYTES / _best_seconds(lambda: source.sum())
    copy = 2 * ARRAY_BYTES / _best_seconds(lambda: target.copy_(source))
    return MachineSpeed(read, copy, _matmul_rate(model))


@torch.inference_mode()
def _matmul_rate(model: ModelConfig) -> float:
    """oneDNN's, with packed weights where torch has it, over the four products of a layer."""
    flops, seconds = 0, 0.0
    for fused in fused_linears(model):
        out_features = sum(part.out_features for part in fused.parts)
        weight = torch.randn(out_features, fused.in_features).bfloat16()
        x = torch.randn(ROWS, fused.in_features).bfloat16()
        flops += 2 * ROWS * weight.numel()
        seconds += _best_seconds(_product(x, weight))
    return flops / seconds


def _product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    if not torch.backends.mkldnn.is_available():
        return partial(F.linear, x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(TURNS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
