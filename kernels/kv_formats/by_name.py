"""The table of formats: a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from polydelta.kernels.kv_formats.format import KVFormat
from polydelta.kernels.kv_formats.native import Native

FORMATS: dict[str, Callable[[], KVFormat]] = {
    "native": Native,
}
