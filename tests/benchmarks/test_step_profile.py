"""What is told of the steps that were timed."""

from __future__ import annotations

import pytest

from benchmarks.floor import Work, step_cost
from benchmarks.machine_speed import MachineSpeed
from benchmarks.step_clock import ATTENTION, DELTAS, HEAD, LINEARS, SAMPLING, TimedStep
from benchmarks.step_profile import mean_parts, profiles_of, usual_steps
from polydelta.engine.models.config import ModelConfig, RopeConfig

SPEED = MachineSpeed(read=1e9, copy=1e9, matmul=1e12)
MODEL = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    context_length=64,
    rope=RopeConfig(10000.0),
    tie_embeddings=False,
    sliding_windows=(None, None, None),
)


def step(tokens: int, **parts: float) -> TimedStep:
    return TimedStep(sequences=3, tokens=tokens, parts=parts)


def test_the_usual_steps_are_the_middle_half() -> None:
    steps = [step(3, a=seconds) for seconds in (9.0, 1.0, 3.0, 2.0, 4.0, 8.0, 5.0, 0.5)]
    assert [one.seconds for one in usual_steps(steps)] == [2.0, 3.0, 4.0, 5.0]


def test_a_single_step_is_usual() -> None:
    assert len(usual_steps([step(3, a=1.0)])) == 1


def test_a_part_that_some_steps_lack_took_no_time_in_them() -> None:
    means = mean_parts([step(3, a=1.0, b=4.0), step(3, a=2.0)])
    assert list(means.items()) == [("b", 2.0), ("a", 1.5)]


def test_prefill_and_decode_are_told_apart_and_mixed_steps_left_out() -> None:
    work = Work(batch=3, prompt_tokens=5, new_tokens=4, ranks=(2,))
    steps = [
        step(15, **{LINEARS: 5.0}),
        step(7, **{LINEARS: 100.0}),
        step(3, **{LINEARS: 1.0, SAMPLING: 0.5}),
    ]
    prefill, decode = profiles_of("three", work, steps, MODEL, SPEED)
    assert (prefill.name, prefill.seconds) == ("prefill of three", 5.0)
    assert (decode.name, decode.seconds) == ("decode step of three", 1.5)


@pytest.mark.parametrize(("ranks", "deltas"), [((), False), ((2,), True)])
def test_each_part_that_must_read_or_multiply_has_a_floor(
    ranks: tuple[int, ...], deltas: bool
) -> None:
    work = Work(batch=3, prompt_tokens=5, new_tokens=4, ranks=ranks)
    steps = [step(15, **{LINEARS: 5.0}), step(3, **{LINEARS: 1.0})]
    _, decode = profiles_of("three", work, steps, MODEL, SPEED)
    assert set(decode.floors) == {LINEARS, HEAD, ATTENTION} | ({DELTAS} if deltas else set())
    cost = step_cost(MODEL, work, tokens=1, context=7)
    assert decode.floors[LINEARS] == cost.linears.seconds(SPEED)
    assert decode.floor == cost.total.seconds(SPEED)
