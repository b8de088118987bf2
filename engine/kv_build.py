"""From what an operator set to how KV is stored, read and shared."""

from __future__ import annotations

import torch

from polydelta.engine.config import EngineConfig
from polydelta.engine.device import DeviceLimits
from polydelta.engine.kv_labels import read_labels
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.kv_setup import KVSetup
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.errors import ModelError
from polydelta.kernels.kv_selection import XAttention


def kv_setup(
    config: EngineConfig, model: ModelConfig, device: torch.device, limits: DeviceLimits
) -> KVSetup:
    """Raises ModelError for what does not compose."""
    try:
        return KVSetup.of(
            config,
            on_gpu=device.type == "cuda",
            sliding_windows=model.has_sliding_windows,
            max_batch_tokens=limits.max_batch_tokens,
            max_batch_size=limits.max_batch_size,
        )
    except ValueError as error:
        raise ModelError(str(error)) from error


def kv_spec(
    config: EngineConfig, setup: KVSetup, model: ModelConfig, dtype: torch.dtype, model_id: str
) -> KVSpec:
    """Raises ModelError for labels of another model, and for a format that cannot store this one's
    heads."""
    labels = None
    try:
        if config.kv_labels is not None:
            labels = read_labels(config.kv_labels, model, model_id)
        return KVSpec.of(model, dtype, config.block_size, setup.format, setup.selection, labels)
    except ValueError as error:
        raise ModelError(str(error)) from error


def kv_rules(setup: KVSetup, spec: KVSpec) -> KVRules:
    prefill = setup.prefill if isinstance(setup.prefill, XAttention) else None
    return KVRules(setup.selection, prefill, setup.format, spec.format.by_page)
