"""What steps are made of, and where their time goes. Imports no torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from polydelta.engine.histogram import Distribution, Histogram
from polydelta.engine.request_stats import TOKENS
from polydelta.engine.sequence import Schedule

PHASE_SECONDS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class StepPhase(StrEnum):
    """What the engine's thread does for a step, in this order."""

    # Orders for adapters, and who computes how many tokens.
    SCHEDULE = "schedule"
    # Tensors made and the model run; on a GPU, only begun.
    LAUNCH = "launch"
    # Until the sampled tokens are there.
    WAIT = "wait"
    # Tokens to text, and to whoever waits for them.
    OUTPUT = "output"


@dataclass(frozen=True)
class StepSnapshot:
    # Seconds.
    phases: Mapping[StepPhase, Distribution] = field(default_factory=dict)
    # Of each step: its tokens, its sequences, and how many different adapters they use.
    tokens: Distribution = field(default_factory=lambda: Histogram(TOKENS).distribution())
    sequences: Distribution = field(default_factory=lambda: Histogram(SEQUENCES).distribution())
    adapters: Distribution = field(default_factory=lambda: Histogram(ADAPTERS).distribution())
    # Tokens computed, by "prefill" or "decode"; recomputed ones count again.
    computed: Mapping[str, int] = field(default_factory=dict)


class StepStats:
    """Belongs to the engine's thread."""

    def __init__(self) -> None:
        self._phases = {phase: Histogram(PHASE_SECONDS) for phase in StepPhase}
        self._tokens = Histogram(TOKENS)
        self._sequences = Histogram(SEQUENCES)
        self._adapters = Histogram(ADAPTERS)
        self._computed: Counter[str] = Counter(prefill=0, decode=0)

    def phase(self, phase: StepPhase, seconds: float) -> None:
        self._phases[phase].observe(seconds)

    def composed(self, schedule: Schedule) -> None:
        tokens = sum(item.num_tokens for item in schedule)
        decodes = sum(item.num_tokens == 1 and not item.is_prefill for item in schedule)
        self._computed["decode"] += decodes
        self._computed["prefill"] += tokens - decodes
        self._tokens.observe(tokens)
        self._sequences.observe(len(schedule))
        # Most sequences have one adapter or none, and whoever shares it shares the reference.
        used = {item.sequence.adapters for item in schedule}
        self._adapters.observe(len({share.ref for shares in used for share in shares}))

    def snapshot(self) -> StepSnapshot:
        return StepSnapshot(
            {phase: histogram.distribution() for phase, histogram in self._phases.items()},
            self._tokens.distribution(),
            self._sequences.distribution(),
            self._adapters.distribution(),
            dict(self._computed),
        )


class StepClock:
    """Tells what each phase of a step takes, in seconds."""

    def __init__(self, tell: Callable[[StepPhase, float], None]) -> None:
        self._tell = tell
        self.began = self._last = time.perf_counter()

    def ended(self, phase: StepPhase) -> None:
        now = time.perf_counter()
        self._tell(phase, now - self._last)
        self._last = now
