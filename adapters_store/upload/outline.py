"""What the files of a staged adapter say of it, for the catalog's record."""

from __future__ import annotations

from pathlib import Path

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.records import AdapterFacts
from polydelta.adapters_store.upload.limits import UploadLimits


def check_outline(folder: Path, limits: UploadLimits) -> AdapterFacts:
    """From the config and the tensors' header alone, so whatever the base.

    Raises InvalidAdapterError for what no base could serve, and for a rank beyond the limits.
    """
    summary = inspect(folder)
    if summary.problem is not None:
        raise InvalidAdapterError(summary.problem)
    rank = max(summary.ranks, default=0)
    if rank > limits.max_rank:
        raise InvalidAdapterError(
            f"The adapter has rank {rank}, but this server takes ranks up to {limits.max_rank}: "
            "train with a smaller r, or shrink the adapter by a singular value decomposition."
        )
    return AdapterFacts(
        summary.format, summary.kinds, rank, modules=summary.modules, nbytes=summary.bytes
    )
