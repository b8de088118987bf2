from __future__ import annotations

import pytest
import torch

from polydelta.engine.config import EngineConfig
from polydelta.engine.device import choose_device, dtype_on, limits_for, torch_dtype
from polydelta.engine.models.errors import ModelError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device("auto") == choose_device("cuda") == GPU
    assert choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"PyTorch finds no GPU: .* use device cpu"):
        choose_device("cuda")
    with pytest.raises(ModelError, match="'tpu' is not supported: use auto, cpu or cuda"):
        choose_device("tpu")


def test_limits_are_the_devices_where_nobody_sets_them() -> None:
    on_cpu, on_gpu = (limits_for(device, EngineConfig()) for device in (CPU, GPU))
    assert (on_cpu.max_batch_tokens, on_cpu.max_batch_size) == (512, 64)
    assert on_cpu.pool_bytes == 2 << 30
    assert on_cpu.steps_ahead == 0
    assert on_gpu.max_batch_tokens > on_cpu.max_batch_tokens
    assert on_gpu.pool_bytes is None
    assert on_gpu.steps_ahead == 1


def test_limits_that_are_set_hold_on_every_device() -> None:
    config = EngineConfig(max_batch_tokens=3, max_batch_size=2, pool_bytes=5, steps_ahead=0)
    for device in (CPU, GPU):
        limits = limits_for(device, config)
        assert (limits.max_batch_tokens, limits.max_batch_size) == (3, 2)
        assert (limits.pool_bytes, limits.steps_ahead) == (5, 0)


def test_more_steps_ahead_than_one_are_refused() -> None:
    with pytest.raises(ModelError, match="steps_ahead is 2: take 0 or 1"):
        limits_for(GPU, EngineConfig(steps_ahead=2))


def test_float16_needs_a_gpu() -> None:
    assert dtype_on(GPU, "float16") is torch.float16
    with pytest.raises(ModelError, match="'float16' needs a GPU: on a CPU use bfloat16"):
        dtype_on(CPU, "float16")


def test_a_dtype_that_is_served_nowhere_is_refused_by_name() -> None:
    assert torch_dtype("float32") is torch.float32
    with pytest.raises(ModelError, match="'int3' is not supported: use bfloat16, float16, float32"):
        torch_dtype("int3")
