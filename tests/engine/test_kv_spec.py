"""How large pages are, and what is said of a pool that has no room for them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from polydelta.engine.kv_spec import MIB, KVSpec, kv_page_bytes
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


@pytest.mark.parametrize("format", ["native", "int8", "int4", "kivi-2"])
@pytest.mark.parametrize("selection", ["full", "h2o"])
def test_a_pool_that_is_too_small_is_told_which_is_not(
    config: ModelConfig, format: str, selection: str
) -> None:
    # So that pages are not lost in what a mebibyte is rounded to.
    spec = KVSpec.of(
        replace(config, num_layers=300), torch.float32, 301, format, parse_selection(selection)
    )
    said = spec.too_small(1000, 2, 3)
    assert said.startswith("A pool of 0.0 MiB has room for no pages")
    needed = re.search(r"raise pool to (\d+) MiB", said)
    assert needed is not None
    told = int(needed[1])
    assert spec.pages_in(told * MIB, 3) == 2
    assert spec.pages_in((told - 1) * MIB, 3) == 1
    assert ("lower max_batch_size" in said) == spec.format.by_page
