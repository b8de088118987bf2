"""Times work on a GPU by its own clock, and what the GPU can do at best, measured alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], object]

# The median of so many turns counts, after some that warm up.
TURNS, WARMING = 9, 2
# Fewer launches in a CUDA graph would not hide the time that its own launch takes.
LAUNCHES = 20
# Inputs of a launch take turns until they have so many bytes: several times an H100's L2 cache of
# 50 MB.
ROTATED_BYTES = 256 << 20


class Clock:
    """Seconds of one run, where several take turns so that no cache has their inputs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, runs: Sequence[Run]) -> float:
        """As a CUDA graph: without the time in which Python launches. What a run launches must not
        depend on the host."""
        if self._device.type != "cuda":
            return self.eager_seconds(runs)
        # What was uploaded on another stream is there.
        torch.cuda.synchronize(self._device)
        # Compiles and tunes, which no recording may do.
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            for run in runs:
                run()
        torch.cuda.synchronize(self._device)
        graph, repeats = torch.cuda.CUDAGraph(), -(-LAUNCHES // len(runs))
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                for run in runs:
                    run()
        return self._turns(graph.replay) / (repeats * len(runs))

    def eager_seconds(self, runs: Sequence[Run]) -> float:
        """As Python launches them."""

        def all_runs() -> None:
            for run in runs:
                run()

        return self._turns(all_runs) / len(runs)

    def _turns(self, run: Run) -> float:
        if self._device.type != "cuda":
            now = time.perf_counter()
            run()
            return time.perf_counter() - now
        seconds: list[float] = []
        for _ in range(WARMING + TURNS):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            ended.synchronize()
            seconds.append(began.elapsed_time(ended) / 1e3)
        return statistics.median(seconds[WARMING:])


@dataclass(frozen=True)
class Ceilings:
    """A second."""

    # Bytes read plus bytes written, of the GPU's own memory.
    copy: float
    # Floating-point operations, of a product of large bfloat16 matrices.
    matmul: float
    # Bytes from page-locked memory of the host to the GPU.
    upload: float

    def floor(self, nbytes: float, flops: float = 0.0) -> float:
        """The least seconds for so many bytes of the GPU's memory and operations."""
        return max(nbytes / self.copy, flops / self.matmul)

    def to_json(self) -> dict[str, Any]:
        return {
            "copy_gb_per_second": round(self.copy / 1e9, 1),
            "matmul_bf16_tflop_per_second": round(self.matmul / 1e12, 2),
            "upload_gb_per_second": round(self.upload / 1e9, 2),
        }


def measure_ceilings(clock: Clock, device: torch.device, nbytes: int, size: int) -> Ceilings:
    """nbytes: of what is copied; size: rows and columns of the matrices."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * nbytes / clock.seconds([lambda: target.copy_(source)])
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    matmul = 2 * size**3 / clock.seconds([lambda: torch.mm(a, b, out=product)])
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    upload = nbytes / clock.eager_seconds([lambda: target.copy_(host, non_blocking=True)])
    return Ceilings(copy, matmul, upload)
