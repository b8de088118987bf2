from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, strategies as st
from peft.utils.other import get_pattern_key

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_config import positive_int
from polydelta.adapters_store.formats.peft_patterns import MAX_PATTERNS, PatternTable

MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 11, 21)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
]

PATTERNS = [
    "q_proj",
    "proj",
    "_proj",
    "self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    "^model.layers.1.self_attn.q_proj",
    "^q_proj",
    r".*\.1\.mlp\.(gate|up)_proj",
    r"layers\.\d+\.self_attn\.[qk]_proj",
    r"layers\.(?:0|1|11|21)\..*(q|k|v)_proj",
    r"[^.]+_proj",
    "k_proj$",
    "model|q_proj",
]


def table(patterns: dict[str, object], default: int = 8) -> PatternTable[int]:
    return PatternTable("rank_pattern", patterns, default, positive_int)


@given(st.lists(st.sampled_from(PATTERNS), max_size=4, unique=True), st.sampled_from(MODULES))
def test_the_lookup_is_that_of_peft(patterns: list[str], module: str) -> None:
    values = {pattern: rank for rank, pattern in enumerate(patterns, start=1)}
    expected = values.get(get_pattern_key(values.keys(), module), 8)
    assert table(dict(values))[module] == expected


def test_the_first_pattern_that_matches_counts() -> None:
    assert table({"q_proj": 3, "self_attn.q_proj": 5})["model.layers.0.self_attn.q_proj"] == 3


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{2,1}", "a**b"])
def test_what_is_no_regular_expression_is_refused_by_field_and_pattern(pattern: str) -> None:
    with pytest.raises(InvalidAdapterError, match=r"rank_pattern.*" + re.escape(repr(pattern))):
        table({pattern: 4})


def test_a_wrong_value_is_refused_with_its_pattern() -> None:
    with pytest.raises(InvalidAdapterError, match=r"rank_pattern\['q_proj'\] is -4"):
        table({"q_proj": -4})


@pytest.mark.parametrize(
    "pattern",
    [
        "(.*)*x",
        "(a+)+x",
        "(?:.+)+x",
        "(.|.)+x",
        "(.|.){40}x",
        "(?x:(.+) +)x",
        r"[\][](.+)+[x]",
        ".*" * 12 + "x",
        ".?" * 40 + "x",
        "(.|.)" * 40 + "x",
        "(" * 30 + ".?" + ")?" * 30 + "x",
        ".*.*.*" + "()" * 100_000 + "x",
    ],
)
def test_a_pattern_that_could_run_for_ages_is_refused_at_once(pattern: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InvalidAdapterError, match="rank_pattern"):
        table({pattern: 4})["model.layers.0.self_attn.q_proj"]
    assert time.perf_counter() - start < 2


def test_a_name_that_is_too_long_for_the_bound_is_refused() -> None:
    with pytest.raises(InvalidAdapterError, match="names of up to 64 characters"):
        table({".*.*.*x": 4})["a" * 100_000]


def test_many_patterns_that_are_slow_together_are_refused() -> None:
    with pytest.raises(InvalidAdapterError, match="too long to match"):
        table({f".*.*.*x{number}": 4 for number in range(1000)})


def test_more_patterns_than_can_be_compiled_soon_are_refused() -> None:
    with pytest.raises(InvalidAdapterError, match=f"{MAX_PATTERNS + 1} patterns, more than"):
        table({f"x{number}": 4 for number in range(MAX_PATTERNS + 1)})


@pytest.mark.parametrize("sign", ["[", "a", "|"])
def test_a_long_pattern_is_refused_before_it_is_looked_through(sign: str) -> None:
    with pytest.raises(
        InvalidAdapterError, match="rank_pattern has a pattern of 900000 characters"
    ):
        table({sign * 900_000: 4})


def test_patterns_that_are_slow_with_all_modules_together_are_refused() -> None:
    slow = table({f".*.*x{number}": 4 for number in range(900)})
    assert slow["model.layers.0.self_attn.q_proj"] == 8
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in range(100)]
    with pytest.raises(InvalidAdapterError, match=r"900 patterns of rank_pattern .* all modules"):
        [slow[module] for module in modules]


def test_a_pattern_for_every_module_of_a_large_model_is_accepted() -> None:
    patterns = {
        f"model.layers.{layer}.mlp.part_{part}": 4 for layer in range(126) for part in range(7)
    }
    ranks = table(dict(patterns))
    assert all(ranks[module] == 4 for module in patterns)
