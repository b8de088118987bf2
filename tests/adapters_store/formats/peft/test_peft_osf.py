from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import OSFConfig
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Dense, LowRank
from polydelta.adapters_store.inspection import inspect


@pytest.fixture(params=["base_model", "biased_model"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"effective_rank": 7},
        {"effective_rank": 0.6},
        {"effective_rank": 5, "rank_pattern": {"k_proj": 4, "layers.2.*down_proj": 0.7}},
        {"init_weights": False, "target_svd_config": {"q_proj": 3}},
    ],
    ids=str,
)
def test_deltas_amount_to_what_peft_computes(
    options: dict[str, Any], model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = OSFConfig(target_modules=["q_proj", "k_proj", "down_proj", "lm_head"], **options)
    adapter = check_parity(config, model)
    assert (adapter.kinds, len(adapter.modules)) == ((Dense.kind,), 10)


# A layer of 36 by 36 has 1296 numbers; 8 components and what they replace have 1152, 9 have 1296.
@pytest.mark.parametrize(
    ("trained", "kind", "rank"), [(5, LowRank, 10), (8, LowRank, 16), (9, Dense, 0)]
)
def test_few_components_are_a_change_of_low_rank(
    trained: int,
    kind: type,
    rank: int,
    model: LlamaForCausalLM,
    check_parity: Any,
    layout_of: Any,
    tmp_path: Path,
) -> None:
    adapter = check_parity(OSFConfig(effective_rank=36 - trained, target_modules=["q_proj"]), model)
    assert (adapter.kinds, adapter.max_rank) == ((kind.kind,), rank)
    summary = inspect(tmp_path / "adapter", layout_of(model))
    assert (summary.kinds, summary.ranks) == (adapter.kinds, (rank,) if rank else ())
    assert (summary.problem is None) == (kind is LowRank)
