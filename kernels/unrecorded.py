"""What kernels have in common that compute each step anew, in memory that the host writes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from polydelta.kernels.ops import RecordedStep
from polydelta.kernels.page_writing import write_pages


class Unrecorded:
    """Methods of `ops.Kernels`."""

    def write_pages(self, storage: Tensor, pages: Sequence[int], layers: Sequence[Tensor]) -> None:
        write_pages(storage, pages, layers)

    def recorded_rows(self, rows: int) -> int | None:  # noqa: ARG002
        return None

    def sizes_to_record(self, most_rows: int) -> Sequence[int]:  # noqa: ARG002
        return ()

    def record(
        self,
        inputs: Sequence[Any],  # noqa: ARG002
        run: Callable[[], Tensor],
    ) -> tuple[Tensor, RecordedStep | None]:
        return run(), None
