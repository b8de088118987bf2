"""How large pages are where nobody sets it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polydelta.engine.kv_spec import KVSpec, kv_page_bytes
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.config import ModelConfig
from polydelta.kernels.kv_selection import parse_selection


@pytest.fixture
def config(tiny_checkpoint: Checkpoint) -> ModelConfig:
    return replace(tiny_checkpoint.config, head_dim=24)


@pytest.mark.parametrize(
    ("format", "selection", "native"),
    [
        ("native", "full", 16),
        ("int4", "window:4+60", 16),
        ("mustafar-50", "full", 64),
        ("mustafar-70", "snapkv", 64),
        ("native", "quest", 8),
        ("mustafar-50", "quest", 8),
    ],
)
def test_pages_have_the_size_that_suits_what_is_done_with_them(
    config: ModelConfig, format: str, selection: str, native: int
) -> None:
    for asked, expected in ((None, native), (5, 5)):
        spec = KVSpec.of(config, torch.float32, asked, format, parse_selection(selection))
        assert spec.page_bytes == kv_page_bytes(config, expected, torch.float32)
        assert spec.token_bytes == spec.page_bytes * config.num_layers / spec.block_size
