"""All kernels, at the sizes of Llama 3 8B, and what else they ship for."""

from __future__ import annotations

from importlib import import_module

from polydelta.kernels.triton.shipping import ShippedKernel

# Those that have kernels of their own.
MODULES = (
    "adapter_copy",
    "attention",
    "deltas",
    "elementwise",
    "kv_shipped",
    "kv_store",
    "sampling",
)


def shipped(module: str) -> list[ShippedKernel]:
    """Of one of MODULES. Triton's interpreter must be off."""
    kernels: list[ShippedKernel] = import_module(f"polydelta.kernels.triton.{module}").shipped()
    return kernels
