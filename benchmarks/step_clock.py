"""Splits the time of an engine's steps among their parts, by timing the calls of its objects.

A part's time is its own: what a call inside it takes counts for that call's part. What the kernels
make (linear layers, deltas) is timed as well, and a kernel that is not in the list of parts is
shown under its own name, as one would be that computes many things in one call.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor

from polydelta.engine.engine import Engine
from polydelta.kernels.ops import Kernels

LINEARS, HEAD, DELTAS, ATTENTION = "linear layers", "head", "deltas", "attention"
SMALL, SAMPLING = "norms, RoPE, SiLU, embedding, residuals", "sampling"
BETWEEN = "between operations: Python, small tensors"
AROUND = "around the step: scheduling, detokenising"
# Method of the kernels -> part.
KERNEL_PARTS = {
    "linear": LINEARS,
    "head": HEAD,
    "gather": SMALL,
    "add": SMALL,
    "argmax": SAMPLING,
    "rms_norm": SMALL,
    "rotate": SMALL,
    "silu_mul": SMALL,
    "store_kv": ATTENTION,
    "plan_attention": ATTENTION,
    "attention": ATTENTION,
    "add_delta": DELTAS,
    "change_output": DELTAS,
    "bind_sites": DELTAS,
    "group_deltas": DELTAS,
}
# Methods of what the kernels make; of a group's product with a layer the deltas are a part that
# cannot be told from the rest where both are computed at once.
MADE_METHODS = ("__call__", "apply", "multiply")
OTHER_PARTS = {"multiply": LINEARS}
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)


@dataclass(frozen=True)
class TimedStep:
    # Sequences that took part, and tokens that were computed.
    sequences: int
    tokens: int
    # Part -> seconds.
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


class StepClock:
    """For the one thread that runs an engine's steps."""

    def __init__(self) -> None:
        self.steps: list[TimedStep] = []
        self._parts: defaultdict[str, float] = defaultdict(float)
        # Parts that are open, the innermost last, and since when that one counts.
        self._open: list[str] = []
        self._since = 0.0
        # Class of what the kernels make, and its part -> a subclass that is timed.
        self._kinds: dict[tuple[type, str], type] = {}

    def watch_kernels(self, kernels: Kernels) -> None:
        """Before anything takes methods of the kernels."""
        for name in dir(kernels):
            method = getattr(kernels, name)
            if callable(method) and not name.startswith("_"):
                setattr(kernels, name, self._timed_method(KERNEL_PARTS.get(name, name), method))

    def watch_engine(self, engine: Engine) -> None:
        """Before the engine is started."""
        runner: Any = engine._runner
        launch, whole = runner.launch, self.timed(AROUND, engine._step)
        size = (0, 0)

        def run(schedule: Any, bound: Any) -> Any:
            nonlocal size
            size = len(schedule), sum(item.num_tokens for item in schedule)
            return launch(schedule, bound)

        def note() -> bool:
            nonlocal size
            size = (0, 0)
            self._parts.clear()
            busy: bool = whole()
            if size != (0, 0):
                self.steps.append(TimedStep(*size, dict(self._parts)))
            return busy

        runner.launch = self.timed(BETWEEN, run)
        runner._sampler.sample = self.timed(SAMPLING, runner._sampler.sample)
        engine._step = note  # type: ignore[method-assign]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Outside of a step nothing but AROUND, which begins one, is timed."""

        def call(*args: Any, **named: Any) -> Any:
            if not self._open and part is not AROUND:
                return function(*args, **named)
            now = time.perf_counter()
            if self._open:
                self._parts[self._open[-1]] += now - self._since
            self._open.append(part)
            self._since = now
            try:
                return function(*args, **named)
            finally:
                now = time.perf_counter()
                self._parts[self._open.pop()] += now - self._since
                self._since = now

        return call

    def _timed_method(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        timed = self.timed(part, method)
        return lambda *args, **named: self._made(part, timed(*args, **named))

    def _made(self, part: str, made: Any) -> Any:
        """A result of the kernels: timed where it computes something when it is used."""
        if isinstance(made, Tensor):
            return made
        if isinstance(made, FUNCTIONS):
            return self.timed(part, made)
        kind = self._timed_kind(type(made), part)
        if kind is not type(made):
            # It stays what it is: others look at its class and its attributes.
            object.__setattr__(made, "__class__", kind)
        return made

    def _timed_kind(self, kind: type, part: str) -> type:
        """A subclass whose methods are timed; the class itself where it has none that compute."""
        if (kind, part) not in self._kinds:
            # Not by hasattr: every class has a __call__, which makes its instances.
            own = {name for each in kind.__mro__ for name in vars(each)}
            methods = [name for name in MADE_METHODS if name in own]
            timed = {
                name: self.timed(OTHER_PARTS.get(name, part), getattr(kind, name))
                for name in methods
            }
            made = type(kind.__name__, (kind,), {"__slots__": (), **timed}) if timed else kind
            self._kinds[kind, part] = self._kinds[made, part] = made
        return self._kinds[kind, part]
