"""Decode steps as CUDA graphs: captured once for each number of rows, replayed by one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class RecordedGraph:
    """`ops.RecordedStep`."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: Sequence[Any], result: Tensor) -> None:
        """inputs: those that it was captured with, which nobody else uses any more."""
        self._graph = graph
        self._inputs = inputs
        self._result = result

    def replay(self, inputs: Sequence[Any]) -> Tensor:
        take_inputs(self._inputs, inputs)
        self._graph.replay()
        return self._result


def take_inputs(held: Sequence[Any], fresh: Sequence[Any]) -> None:
    """Copies a step's inputs to where a recorded step reads its own; both have the same shapes."""
    for target, source in zip(held, fresh, strict=True):
        if isinstance(target, Tensor):
            target.copy_(source)
        else:
            target.assume(source)


class GraphRecorder:
    """Captures steps. All graphs share one pool of memory: only one of them runs at a time."""

    def __init__(self, most_rows: int) -> None:
        """most_rows: of a result."""
        self._most_rows = most_rows
        self._pool: Any = None
        # [most_rows, size], where all steps put their results: each kept apart, logits for 256 rows
        # of 128,000 tokens would take 130 MB for each graph.
        self._results: Tensor | None = None

    def record(
        self, inputs: Sequence[Any], run: Callable[[], Tensor]
    ) -> tuple[Tensor, RecordedGraph]:
        """See `ops.Kernels.record`."""
        # Before the capture: it would not survive that kernels are compiled and tuned.
        result = run()
        rows, size = result.shape
        if self._results is None:
            self._results = result.new_empty(self._most_rows, size)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others page-lock memory for adapters meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._results[:rows].copy_(run())
        self._pool = graph.pool()
        return result, RecordedGraph(graph, inputs, self._results[:rows])
