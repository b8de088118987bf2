"""What fits a pool, and what is said of one in which nothing does."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from polydelta.engine.config import EngineConfig
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.errors import ModelError
from polydelta.engine.pool_sizes import LEAST_PAGES, MIB, PoolSizes
from polydelta.engine.pools import Pools
from polydelta.kernels.kv_selection import parse_selection

SEQUENCES = 3


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Checkpoint) -> ModelConfig:
    # So that pages are not lost in what a mebibyte is rounded to.
    return replace(tiny_checkpoint.config, head_dim=24, num_layers=300)


def spec_of(config: ModelConfig, format: str = "native", selection: str = "full") -> KVSpec:
    return KVSpec.of(config, torch.float32, 301, format, parse_selection(selection))


def sizes_of(pool_bytes: int, spec: KVSpec, adapter_share: float | None = None) -> PoolSizes:
    return PoolSizes.of(pool_bytes, spec, SEQUENCES, EngineConfig(adapter_share=adapter_share))


def refusal(pool_bytes: int, spec: KVSpec, adapter_share: float | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        sizes_of(pool_bytes, spec, adapter_share)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", ["native", "int8", "int4", "kivi-2"])
@pytest.mark.parametrize("selection", ["full", "h2o"])
@pytest.mark.parametrize("adapter_share", [None, 0.3, 0.5, 0.9])
def test_the_pool_that_a_refusal_asks_for_is_the_smallest_that_will_do(
    config: ModelConfig, format: str, selection: str, adapter_share: float | None
) -> None:
    spec = spec_of(config, format, selection)
    said = refusal(1000, spec, adapter_share)
    assert said.startswith("A pool of 0.0 MiB has room for no pages")
    needed = re.search(r"raise pool to (\d+) MiB", said)
    assert needed is not None
    told = int(needed[1]) * MIB
    assert sizes_of(told, spec, adapter_share).num_kv_pages == LEAST_PAGES
    refusal(told - MIB, spec, adapter_share)
    assert said.endswith("block_size.")
    assert ("lower max_batch_size or" in said) == spec.format.by_page
    assert ("sequences" in said) == spec.format.by_page


def test_a_refusal_says_what_adapters_have(config: ModelConfig) -> None:
    spec = spec_of(config)
    assert "has room for 1 page of" in refusal(spec.all_bytes, spec)
    assert ", and KV needs 2: raise" in refusal(spec.all_bytes, spec)
    said = refusal(10 * spec.all_bytes, spec, 0.9)
    assert "has room for 10 pages of" in said
    assert "and KV needs 2 beside the 0.9 of them that adapters have: raise" in said


@given(
    pages=st.integers(LEAST_PAGES, 3000),
    share=st.one_of(st.none(), st.floats(0.01, 0.99)),
    more=st.floats(0, 0.999),
)
def test_pages_are_those_that_the_pools_have(
    config: ModelConfig, pages: int, share: float | None, more: float
) -> None:
    spec = spec_of(config)
    pools = Pools.of(pages, share)
    pool_bytes = int((pages + more) * spec.all_bytes)
    if pools.kv.num_pages < LEAST_PAGES:
        refusal(pool_bytes, spec, share)
        return
    sizes = sizes_of(pool_bytes, spec, share)
    assert (sizes.num_pages, sizes.num_kv_pages) == (pages, pools.kv.num_pages)
    fitting = sizes.num_kv_pages * spec.block_size
    assert sizes.max_positions == min(config.context_length, fitting)
    assert sizes.max_model_len == min(config.context_length, fitting // 2)


def test_the_longest_sequence_that_is_asked_for_must_fit(config: ModelConfig) -> None:
    config = replace(config, context_length=5000)
    spec = spec_of(config)
    # 1,204 tokens.
    pool = 4 * spec.all_bytes

    def asked(tokens: int, spec: KVSpec = spec) -> PoolSizes:
        return PoolSizes.of(pool, spec, SEQUENCES, EngineConfig(max_model_len=tokens))

    assert asked(1203).max_model_len == 1203
    with pytest.raises(ModelError, match="max_model_len 1204 leaves no room in a pool of 1204"):
        asked(1204)
    with pytest.raises(ModelError, match=r"max_model_len 5001 is not within .* 5000 tokens"):
        asked(5001)


def test_a_window_is_served_whatever_its_length(config: ModelConfig) -> None:
    spec = replace(spec_of(config), selection=parse_selection("window:2+9"))
    pool = 8 * spec.all_bytes
    assert sizes_of(pool, spec).max_model_len == config.context_length
