"""Which device the model runs on, and the limits that suit it where an operator sets none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polydelta.engine.config import EngineConfig
from polydelta.engine.models.errors import ModelError


@dataclass(frozen=True)
class DeviceLimits:
    """As `EngineConfig` names them."""

    max_batch_tokens: int
    max_batch_size: int
    # None: what the memory has left when everything else has its place.
    pool_bytes: int | None
    # Steps that are launched before the tokens of the one before are known.
    steps_ahead: int


_LIMITS = {
    "cpu": DeviceLimits(512, 64, 2 << 30, 0),
    # A GPU needs thousands of tokens of prompts in a step to keep its tensor cores busy, and it
    # computes beside the thread that launches its steps.
    "cuda": DeviceLimits(8192, 256, None, 1),
}


def choose_device(name: str) -> torch.device:
    """name: "cpu", "cuda", or "auto" for a GPU where there is one. Raises ModelError."""
    if name not in ("auto", *_LIMITS):
        raise ModelError(f"device {name!r} is not supported: use auto, cpu or cuda.")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ModelError(
            "device 'cuda' was asked for, but PyTorch finds no GPU: install NVIDIA's "
            "driver and a CUDA build of PyTorch (docs/gpu.md says how), or use device cpu."
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def limits_for(device: torch.device, config: EngineConfig) -> DeviceLimits:
    """What the config says, and the device's own where it says nothing. Raises ModelError."""
    if config.steps_ahead not in (None, 0, 1):
        raise ModelError(f"steps_ahead is {config.steps_ahead}: take 0 or 1.")
    own = _LIMITS[device.type]
    return DeviceLimits(
        own.max_batch_tokens if config.max_batch_tokens is None else config.max_batch_tokens,
        own.max_batch_size if config.max_batch_size is None else config.max_batch_size,
        own.pool_bytes if config.pool_bytes is None else config.pool_bytes,
        own.steps_ahead if config.steps_ahead is None else config.steps_ahead,
    )


def torch_dtype(name: str) -> torch.dtype:
    """Raises ModelError for a dtype that is served nowhere."""
    dtypes = {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
    }
    if name not in dtypes:
        raise ModelError(f"dtype {name!r} is not supported: use {', '.join(dtypes)}.")
    return dtypes[name]


def dtype_on(device: torch.device, name: str) -> torch.dtype:
    """Raises ModelError for a dtype that is not served on the device."""
    dtype = torch_dtype(name)
    if dtype == torch.float16 and device.type == "cpu":
        raise ModelError("dtype 'float16' needs a GPU: on a CPU use bfloat16 or float32.")
    return dtype
