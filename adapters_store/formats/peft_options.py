"""What the configs of several of PEFT's tuners have in common."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

from polydelta.adapters_store.base_layout import EMBEDDING, BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_config import Config, mapping, number, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes
from polydelta.adapters_store.formats.peft_patterns import PatternTable
from polydelta.adapters_store.reference import CONFIG_FILE

# Our own key: PEFT is told the task with each call, and an adapter that is served is one task's.
TASK = "polydelta_task_id"

# What a generator of random numbers takes.
_SEEDS = range(-(1 << 63), 1 << 64)


def one_of(field: str, value: object, choices: tuple[str, ...]) -> str:
    """Raises InvalidAdapterError for anything but one of them."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} is {reprlib.repr(value)}, but must be one of "
            f"{', '.join(choices)}."
        )
    return value


def seed(field: str, value: object) -> int:
    """Raises InvalidAdapterError for anything but an integer of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or value not in _SEEDS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} is {reprlib.repr(value)}, but must be a whole number of 64 "
            "bits."
        )
    return value


def task_id(field: str, config: Config) -> int:
    """Which of its tasks an adapter is. field: the key with their number.

    Raises InvalidAdapterError when the config does not say it, unless there is only one.
    """
    tasks, task = positive_int(field, config.get(field)), config.get(TASK)
    if task is None and tasks == 1:
        return 0
    if not isinstance(task, int) or isinstance(task, bool) or not 0 <= task < tasks:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {TASK} is {reprlib.repr(task)}, but must be one of the adapter's "
            f"{tasks} tasks ({field}): add {TASK}, a number from 0 to {tasks - 1}; each task is an "
            "adapter of its own."
        )
    return task


def rank_table(config: Config) -> PatternTable[int]:
    """By module: r, or what rank_pattern says. Raises InvalidAdapterError."""
    patterns = mapping("rank_pattern", config.get("rank_pattern"))
    rank = positive_int("r", config.get("r"))
    return PatternTable("rank_pattern", patterns, rank, positive_int)


def alpha_table(field: str, config: Config) -> PatternTable[float]:
    """By module: the field, or what alpha_pattern says. Raises InvalidAdapterError."""
    patterns = mapping("alpha_pattern", config.get("alpha_pattern"))
    alpha = number(field, config.get(field))
    return PatternTable("alpha_pattern", patterns, alpha, number)


@dataclass(frozen=True)
class Scales:
    """`alpha / r`, both of which may differ from module to module."""

    ranks: PatternTable[int]
    alphas: PatternTable[float]

    @classmethod
    def of(cls, config: Config) -> Scales:
        """Raises InvalidAdapterError."""
        return cls(rank_table(config), alpha_table("alpha", config))

    def __getitem__(self, module: str) -> float:
        return self.alphas[module] / self.ranks[module]


def refuse_surplus(shapes: ModuleShapes, parameter: str, why: str) -> None:
    """why: what in the config says that there is none. Raises InvalidAdapterError for a parameter
    that the file has all the same."""
    if parameter in shapes:
        raise InvalidAdapterError(
            f"Module {shapes.module!r} has {parameter}, but {why} in {CONFIG_FILE}: the weights "
            "belong to another config; save the adapter again from the trained model."
        )


def linear_layers(layout: BaseLayout) -> Mapping[str, object]:
    """What tuners of linear layers alone may change: all targets but the embedding."""
    return {name: shape for name, shape in layout.target_shapes.items() if name != EMBEDDING}
