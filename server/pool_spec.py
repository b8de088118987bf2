"""What `--pool` says: how much memory, and whether it is split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, ByteSize, TypeAdapter, ValidationError

SPLIT = "split:"


@dataclass(frozen=True)
class PoolSpec:
    """The pool that KV cache and adapters have."""

    # None: what suits the device.
    nbytes: int | None = None
    # Of the pool, what adapters have for themselves; None: they share all of it with the KV cache.
    adapter_share: float | None = None


def parse_pool(value: object) -> object:
    """`2GiB`, `split:0.5`, or both with a comma between them. Raises ValueError."""
    if isinstance(value, PoolSpec) or value is None:
        return value
    size: int | None = None
    share: float | None = None
    for part in str(value).split(","):
        if part.startswith(SPLIT) and share is None:
            share = _parse_share(part)
        elif size is None and not part.startswith(SPLIT):
            size = _parse_size(part)
        else:
            raise ValueError(f"{value!r} says it twice: write 2GiB, split:0.5 or 2GiB,split:0.5")
    return PoolSpec(size, share)


def _parse_size(text: str) -> int:
    try:
        size = TypeAdapter(ByteSize).validate_python(text.strip())
    except ValidationError:
        size = ByteSize(0)
    if size <= 0:
        raise ValueError(
            f"{text!r} is no size: write 512MiB or 2GiB, and with split:0.5 behind a comma, keep"
            " half of it for adapters"
        )
    return int(size)


def _parse_share(text: str) -> float:
    try:
        share = float(text.removeprefix(SPLIT))
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"{text!r} is no share: write a number between 0 and 1, as in split:0.5")
    return share


PoolSetting = Annotated[PoolSpec, BeforeValidator(parse_pool)]
