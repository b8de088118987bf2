"""The table of formats: a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from polydelta.kernels.kv_formats.format import KVFormat
from polydelta.kernels.kv_formats.gear import Gear
from polydelta.kernels.kv_formats.int4 import Int4
from polydelta.kernels.kv_formats.kivi import Kivi
from polydelta.kernels.kv_formats.mustafar import Mustafar
from polydelta.kernels.kv_formats.native import Native
from polydelta.kernels.kv_formats.scaled import Fp8, Int8

FORMATS: dict[str, Callable[[], KVFormat]] = {
    "native": Native,
    "int8": Int8,
    "int4": Int4,
    "fp8": Fp8,
    "kivi-4": partial(Kivi, 4),
    "kivi-2": partial(Kivi, 2),
    "mustafar-50": partial(Mustafar, 0.5),
    "mustafar-70": partial(Mustafar, 0.7),
    "gear": Gear,
}
