"""A step of native calls, recorded once and then replayed by one call, as CUDA graphs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polydelta.kernels.cpu.arena import tensor_at
from polydelta.kernels.cpu.native import NativePool, Struct

# What of torch's makes no numbers: it need not be done again.
_VIEWS = {
    "alias", "as_strided", "detach", "empty", "expand", "narrow", "permute", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unflatten", "unsqueeze", "view",
}  # fmt: skip


class NotRecordableError(RuntimeError):
    """Something was computed that a replay would leave out."""


class _OnlyViews(TorchDispatchMode):
    """Lets torch compute nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in _VIEWS:
            raise NotRecordableError(f"torch computes {func}")
        return func(*args, **(kwargs or {}))


class NativeStep:
    """`ops.RecordedStep`."""

    def __init__(
        self, pool: NativePool, recording: Struct, inputs: Sequence[Any], result: Tensor
    ) -> None:
        self._pool = pool
        self._recording = recording
        self._inputs = inputs
        # Not the tensor: its memory is others' between two replays.
        self._result = result.data_ptr(), result.shape, result.dtype

    def replay(self, inputs: Sequence[Any]) -> Tensor:
        for held, fresh in zip(self._inputs, inputs, strict=True):
            if isinstance(held, Tensor):
                held.copy_(fresh)
            else:
                held.assume(fresh)
        self._pool.replay(self._recording)
        return tensor_at(*self._result)


def record(
    pool: NativePool, inputs: Sequence[Any], run: Callable[[], Tensor]
) -> tuple[Tensor, NativeStep | None]:
    """See `ops.Kernels.record`."""
    if not all(isinstance(each, Tensor) or getattr(each, "recordable", False) for each in inputs):
        return run(), None
    try:
        with _OnlyViews():
            recording, result = pool.record(run)
    except NotRecordableError:
        return run(), None
    return result, NativeStep(pool, recording, inputs, result)
