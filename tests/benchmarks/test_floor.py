"""The floor of work with a model that is small enough to count by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.floor import Cost, Work, floor_of, query_key_pairs, step_cost, tokens_seen
from benchmarks.machine_speed import MachineSpeed, median_speed
from polydelta.engine.models.config import ModelConfig, RopeConfig

# 10 bytes and 100 operations a second.
SPEED = MachineSpeed(read=10.0, copy=8.0, matmul=100.0)
# q [6, 5], k and v [3, 5] each, o [5, 6], gate and up [7, 5] each, down [5, 7]: 195 weights in a
# block. Their inputs and outputs together: 11 + 8 + 8 + 11 + 12 + 12 + 12 = 74.
MODEL = ModelConfig(
    family="llama",
    vocab_size=11,
    hidden_size=5,
    intermediate_size=7,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=3,
    rms_norm_eps=1e-5,
    context_length=64,
    rope=RopeConfig(10000.0),
    tie_embeddings=True,
    sliding_windows=(None, None),
)


def test_a_step_takes_as_long_as_the_slower_of_reading_and_computing() -> None:
    assert Cost(nbytes=30, flops=200).seconds(SPEED) == 3.0
    assert Cost(nbytes=30, flops=400).seconds(SPEED) == 4.0


def test_memory_is_as_fast_as_it_moves_most() -> None:
    assert MachineSpeed(read=5.0, copy=8.0, matmul=1.0).memory == 8.0
    assert Cost(nbytes=16).seconds(MachineSpeed(5.0, 8.0, 1.0)) == 2.0


def test_of_several_measurements_the_medians_count() -> None:
    speeds = [MachineSpeed(1.0, 9.0, 5.0), MachineSpeed(3.0, 8.0, 7.0), MachineSpeed(2.0, 4.0, 6.0)]
    assert median_speed(speeds) == MachineSpeed(2.0, 8.0, 6.0)


def test_a_decode_step_reads_all_weights_once_and_multiplies_them_for_each_row() -> None:
    cost = step_cost(MODEL, Work(3, 4, 5), tokens=1, context=6)
    assert cost.linears == Cost(nbytes=2 * 195 * 2, flops=2 * 3 * 195 * 2)
    assert cost.head == Cost(nbytes=11 * 5 * 2, flops=2 * 3 * 11 * 5)
    assert cost.adapters == Cost()


def test_a_prefill_needs_the_head_for_its_last_tokens_only() -> None:
    cost = step_cost(MODEL, Work(3, 4, 5), tokens=4, context=4)
    assert cost.linears == Cost(nbytes=2 * 195 * 2, flops=2 * 12 * 195 * 2)
    assert cost.head == Cost(nbytes=11 * 5 * 2, flops=2 * 3 * 11 * 5)


def test_quantised_weights_are_fewer_bytes_and_no_fewer_operations() -> None:
    work = Work(3, 4, 5, weight_bits=4.5, head_bits=8)
    cost, plain = (step_cost(MODEL, each, 1, 6) for each in (work, Work(3, 4, 5)))
    assert cost.linears == Cost(nbytes=2 * 195 * 4.5 / 8, flops=plain.linears.flops)
    assert cost.head == Cost(nbytes=11 * 5, flops=plain.head.flops)


def test_keys_and_values_are_read_for_every_sequence() -> None:
    attention = step_cost(MODEL, Work(3, 4, 5), tokens=1, context=6).attention
    # Two layers, keys and values of 3 numbers of 2 bytes; 6 numbers of queries, multiplied twice.
    assert attention == Cost(nbytes=2 * 3 * 6 * 2 * 3 * 2, flops=2 * 3 * 6 * 4 * 6)


def test_a_window_bounds_what_attention_reads_in_its_layer() -> None:
    windowed = replace(MODEL, sliding_windows=(None, 2))
    attention = step_cost(windowed, Work(1, 4, 5), tokens=1, context=6).attention
    assert attention == Cost(nbytes=(6 + 2) * 2 * 3 * 2, flops=(6 + 2) * 4 * 6)


@pytest.mark.parametrize(
    ("tokens", "context", "window", "seen", "pairs"),
    [
        (4, 4, None, 4, 1 + 2 + 3 + 4),
        (2, 5, None, 5, 4 + 5),
        (4, 4, 2, 4, 1 + 2 + 2 + 2),
        (2, 9, 3, 4, 3 + 3),
        (1, 9, 3, 3, 3),
    ],
)
def test_a_query_sees_itself_and_what_is_before_it(
    tokens: int, context: int, window: int | None, seen: int, pairs: int
) -> None:
    assert tokens_seen(tokens, context, window) == seen
    assert query_key_pairs(tokens, context, window) == pairs


def test_each_distinct_adapter_is_read_once_and_multiplied_for_its_rows() -> None:
    # Two layers of 74 numbers a rank; rows have ranks 1, 3, 1.
    adapters = step_cost(MODEL, Work(3, 4, 5, (1, 3)), tokens=1, context=6).adapters
    assert adapters == Cost(nbytes=(1 + 3) * 74 * 2 * 2, flops=2 * (1 + 3 + 1) * 74 * 2)


def test_an_adapter_that_no_sequence_has_is_not_read() -> None:
    few = step_cost(MODEL, Work(1, 4, 5, (1,)), 1, 6)
    assert step_cost(MODEL, Work(1, 4, 5, (1, 3)), 1, 6) == few


def test_the_prefill_gives_the_first_token_and_each_decode_step_one_more() -> None:
    work = Work(3, 4, 3)
    floor = floor_of(MODEL, work, SPEED)
    assert floor.prefill == step_cost(MODEL, work, 4, 4).total.seconds(SPEED)
    steps = [step_cost(MODEL, work, 1, context).total.seconds(SPEED) for context in (5, 6)]
    assert floor.decode == pytest.approx(sum(steps), rel=1e-12)
    assert floor.tokens_per_second == pytest.approx(9 / (floor.prefill + sum(steps)), rel=1e-12)
