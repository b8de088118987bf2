"""Which HTTP status an adapter's error is answered with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from polydelta.adapters_store.errors import (
    AdapterError,
    InUseError,
    StoreError,
    TooLargeError,
    UnknownAdapterError,
)
from polydelta.server.errors import ApiError

# The first that fits counts; every other AdapterError is what the client can mend.
STATUSES: tuple[tuple[type[AdapterError], int], ...] = (
    (UnknownAdapterError, 404),
    (InUseError, 409),
    (TooLargeError, 413),
    (StoreError, 503),
    (AdapterError, 400),
)


@contextmanager
def adapter_errors(param: str | None = None) -> Iterator[None]:
    """Turns adapters' errors into ApiError. param: the request's field that they are about, unless
    the server is to blame."""
    try:
        yield
    except AdapterError as error:
        status = next(status for kind, status in STATUSES if isinstance(error, kind))
        raise ApiError(status, str(error), param if status < 500 else None) from None
