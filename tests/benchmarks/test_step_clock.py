"""Whose time is counted for which part; the clock is a number that the calls move on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import step_clock
from benchmarks.step_clock import AROUND, ATTENTION, BETWEEN, DELTAS, LINEARS, SAMPLING, StepClock


@dataclass
class Now:
    seconds: float = 100.0

    def passes(self, seconds: float, result: Any = None) -> Callable[..., Any]:
        """Something that takes so many seconds."""

        def call(*_: Any) -> Any:
            self.seconds += seconds
            return result

        return call


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    now = Now()
    fake = SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr(step_clock, "time", fake)
    return now


@dataclass(frozen=True)
class Layer:
    """A linear layer that must not become another object: it is looked at."""

    now: Now
    weight: str = "w"

    def __call__(self, x: Tensor) -> Tensor:
        self.now.seconds += 3.0
        return x


class Group:
    __slots__ = ("now",)

    def __init__(self, now: Now) -> None:
        self.now = now

    def apply(self, *_: Any) -> None:
        self.now.seconds += 5.0


class FakeKernels:
    def __init__(self, now: Now) -> None:
        self.now = now

    def linear(self, *_: Any) -> Layer:
        self.now.seconds += 1000.0
        return Layer(self.now)

    def attention(self, plan: Any, x: Tensor) -> Tensor:
        self.now.seconds += 7.0
        return x

    def add_delta(self, *_: Any) -> Callable[..., None]:
        return self.now.passes(11.0)

    def group_deltas(self, *_: Any) -> Group:
        self.now.seconds += 1.0
        return Group(self.now)

    def store_kv(self) -> None:
        self.now.seconds += 2.0

    def whole_layer(self) -> None:
        self.now.seconds += 13.0


@dataclass
class FakeEngine:
    """Its runner is given `work` to do in a step of the schedule."""

    now: Now
    work: Callable[[], object]
    schedule: list[Any] = field(default_factory=lambda: [SimpleNamespace(num_tokens=4)])

    def __post_init__(self) -> None:
        sampler = SimpleNamespace(sample=self.now.passes(0.25))
        self._runner = SimpleNamespace(launch=self._run, _sampler=sampler)

    def _run(self, schedule: Any, bound: Any) -> None:
        self.now.seconds += 1.0
        self.work()
        self._runner._sampler.sample()

    def _step(self) -> bool:
        self.now.seconds += 0.5
        if self.schedule:
            self._runner.launch(self.schedule, None)
        return bool(self.schedule)


def watched(now: Now, work: Callable[[Any], object]) -> tuple[StepClock, Any]:
    """A clock, and an engine whose steps do `work(kernels)`."""
    clock, kernels = StepClock(), FakeKernels(now)
    clock.watch_kernels(kernels)  # type: ignore[arg-type]
    engine: Any = FakeEngine(now, lambda: work(kernels))
    clock.watch_engine(engine)
    return clock, engine


def test_a_part_has_its_own_time_without_that_of_the_parts_in_it(now: Now) -> None:
    clock, engine = watched(now, lambda kernels: kernels.attention(None, torch.zeros(1)))
    engine._step()
    (step,) = clock.steps
    assert step.parts == {AROUND: 0.5, BETWEEN: 1.0, ATTENTION: 7.0, SAMPLING: 0.25}
    assert step.seconds == 8.75
    assert (step.sequences, step.tokens) == (1, 4)


def test_what_the_kernels_make_is_timed_when_it_is_used(now: Now) -> None:
    clock, kernels = StepClock(), FakeKernels(now)
    clock.watch_kernels(kernels)  # type: ignore[arg-type]
    layer, add = kernels.linear(), kernels.add_delta()

    def work() -> None:
        layer(torch.zeros(1))
        add()
        kernels.group_deltas().apply(0)

    engine: Any = FakeEngine(now, work)
    clock.watch_engine(engine)
    engine._step()
    assert clock.steps[0].parts[LINEARS] == 3.0
    assert clock.steps[0].parts[DELTAS] == 11.0 + 1.0 + 5.0


def test_what_the_kernels_make_stays_what_it_is(now: Now) -> None:
    clock, kernels = StepClock(), FakeKernels(now)
    clock.watch_kernels(kernels)  # type: ignore[arg-type]
    layer = kernels.linear()
    assert isinstance(layer, Layer)
    assert layer.weight == "w"
    assert type(layer) is type(kernels.linear())


def test_a_kernel_that_nobody_knows_is_a_part_of_its_own(now: Now) -> None:
    clock, engine = watched(now, lambda kernels: (kernels.whole_layer(), kernels.store_kv()))
    engine._step()
    assert clock.steps[0].parts["whole_layer"] == 13.0
    assert clock.steps[0].parts[ATTENTION] == 2.0


def test_what_happens_outside_of_steps_is_not_timed(now: Now) -> None:
    clock, engine = watched(now, lambda kernels: None)
    now.seconds += 50.0
    engine._step()
    assert clock.steps[0].seconds == 1.75


def test_a_step_with_nothing_to_do_is_not_noted(now: Now) -> None:
    clock, engine = watched(now, lambda kernels: None)
    engine.schedule.clear()
    assert not engine._step()
    assert clock.steps == []


def test_a_step_that_fails_leaves_the_clock_in_order(now: Now) -> None:
    failing = [True]

    def work(kernels: Any) -> None:
        kernels.store_kv()
        if failing:
            raise ValueError(failing.pop())

    clock, engine = watched(now, work)
    with pytest.raises(ValueError, match="True"):
        engine._step()
    engine._step()
    (step,) = clock.steps
    assert step.parts == {AROUND: 0.5, BETWEEN: 1.0, ATTENTION: 2.0, SAMPLING: 0.25}
