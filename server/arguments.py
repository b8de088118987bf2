"""Arguments that several commands about adapters take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Of the weights in a file; torch calls them the same."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def _free(folder: Path) -> Path:
    """Before the work: a taken name should not cost the wait. Raises StoreError."""
    # Here and not above: `polydelta --help` must not wait for torch.
    from polydelta.adapters_store.formats.adapter_folder import check_free

    check_free(folder)
    return folder


Adapter = Annotated[str, typer.Argument(help="An adapter's folder, or its id.")]
OutFolder = Annotated[
    Path,
    typer.Argument(metavar="OUT_FOLDER", help="New folder; not there or empty.", callback=_free),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Base model of the adapter; without it, the one that `serve` would take.",
        metavar="PATH|HUB_ID",
    ),
]
