"""Few configurations for each kernel; which is the fastest is measured once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton

# Whether kernels run in Triton's interpreter, on CPU tensors: it measures nothing.
INTERPRETED: bool = triton.knobs.runtime.interpret


def tuned(
    configs: Sequence[triton.Config], key: Sequence[str], in_place: Sequence[str] = ()
) -> Callable[[Any], Any]:
    """Decorates what `triton.jit` made. For each new combination of `key`'s arguments the configs
    are timed and the result is kept in Triton's cache; the interpreter takes the first one.

    in_place: pointers that the kernel both reads and writes: their content is put back after each
    timed run.
    """
    decorate: Callable[[Any], Any] = triton.autotune(
        list(configs[:1] if INTERPRETED else configs),
        key=list(key),
        restore_value=list(in_place),
        cache_results=True,
    )
    return decorate
