"""Pickles with tensors, which other projects save. For conversion offline: a server opens none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polydelta.adapters_store.errors import InvalidAdapterError

_scalar = np.float64(0).__reduce__()[0]
# What may be in such a file beside what torch allows: numpy's numbers, under their old name and
# their new one.
_ALLOWED: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.int64)),
    type(np.dtype(np.int32)),
]


def load_pickle(path: Path) -> Any:
    """Tensors, numbers, strings, lists and dicts; nothing in the file is run.

    Raises InvalidAdapterError when the file cannot be read, is damaged or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InvalidAdapterError(
            f"{path} cannot be read ({error.strerror}): check that the file is there and readable."
        ) from None
    except Exception as error:  # its parser raises whatever it runs into
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise InvalidAdapterError(
            f"{path.name} is not read: "
            + (
                f"it asks for {foreign[1]}, which is run when it is opened; save tensors alone."
                if foreign
                else "it is no file that torch.save wrote, or not all of it; copy or save it again."
            )
        ) from None
