"""Decode steps as CUDA graphs: captured once for each number of rows, replayed by one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


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
        # The pool is there for as long as one of its graphs is: the newest is kept.
        self._newest: torch.cuda.CUDAGraph | None = None
        # [most_rows, size], where all steps put their results: each kept apart, logits for 256 rows
        # of 128,000 tokens would take 130 MB for each graph.
        self._results: Tensor | None = None

    def record(
        self, inputs: Sequence[Any], run: Callable[[], Tensor]
    ) -> tuple[Tensor, RecordedGraph | None]:
        """See `ops.Kernels.record`; None where the step cannot be captured."""
        # Before the capture, which would not survive that kernels are compiled.
        result = run()
        rows, size = result.shape
        if self._results is None or self._results.shape[1] != size:
            self._results = result.new_empty(self._most_rows, size)
        try:
            graph = self._captured(run, self._results[:rows])
        except RuntimeError:
            logger.exception("a step of %d rows could not be captured; it is slower without", rows)
            return result, None
        return result, RecordedGraph(graph, inputs, self._results[:rows])

    def _captured(self, run: Callable[[], Tensor], result: Tensor) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = None if self._newest is None else self._newest.pool()
        # Of this thread alone: others page-lock memory for adapters meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result.copy_(run())
        self._newest = graph
        return graph
