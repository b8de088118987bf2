"""`rank_pattern` and `alpha_pattern`: values for modules whose names match a regular expression.

The expressions come with the adapter, and Python's matcher can take exponential time while it
holds the interpreter's lock. So what each can cost is bounded before it is run. Lists of names come
with the adapter too, and may be as long as its config can be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from typing import Any, Generic, TypeVar

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.reference import CONFIG_FILE

T = TypeVar("T")

# Steps that all patterns of a table may take on one module name: tens of milliseconds at worst.
MAX_STEPS = 1 << 22
# And on all module names that are looked up in it: two seconds at worst.
MAX_TOTAL_STEPS = 1 << 28
# What a pattern that fails at once costs, in steps: 0.3 us.
_CALL_STEPS = 64
# Compiling takes 0.2 ms a pattern, and finding classes in it time that grows with its square.
MAX_PATTERNS = 4096
MAX_PATTERN_LENGTH = 1024
# Module names of the bases that are served are shorter.
NAME_LENGTH = 64

# Escaped characters and character classes, whose signs mean nothing, and how a plain group begins.
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:")
_REPEAT = re.compile(r"[*+?{]\??")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def ends_in(name: str, endings: Container[str]) -> bool:
    """Whether the name ends with one of them. There may be many thousands, and as many names: not
    each is tried with each."""
    return any(name[start:] in endings for start in range(len(name) + 1))


class PatternTable(Generic[T]):
    """Looks up the value for a module as PEFT does: the first pattern, in the file's order, that
    matches the end of the module's name from a dot on; else the default."""

    def __init__(
        self,
        field: str,
        patterns: Mapping[str, Any],
        default: T,
        check: Callable[[str, object], T],
    ) -> None:
        """check(field, value) gives the value as a T. Raises InvalidAdapterError."""
        self._field = field
        self._default = default
        self._entries: list[tuple[re.Pattern[str], T]] = []
        if len(patterns) > MAX_PATTERNS:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: {field} has {len(patterns)} patterns, more than {MAX_PATTERNS}: "
                "write one pattern for modules that have the same value."
            )
        steps = 0
        for pattern, value in patterns.items():
            steps += _steps(field, pattern)
            if steps > MAX_STEPS:
                raise InvalidAdapterError(
                    f"{CONFIG_FILE}: the patterns of {field} up to {pattern[:80]!r} could take too "
                    "long to match: write them with fewer repeats and alternatives."
                )
            self._entries.append(
                (_compile(field, pattern), check(f"{field}[{pattern[:80]!r}]", value))
            )
        self._lookup_steps = steps + _CALL_STEPS * len(patterns)
        self._steps_left = MAX_TOTAL_STEPS

    def __getitem__(self, module: str) -> T:
        """Raises InvalidAdapterError for a name too long for the patterns' bound to hold, and when
        so many modules were looked up that the patterns take too long in all."""
        if self._entries and len(module) > NAME_LENGTH:
            raise InvalidAdapterError(
                f"The adapter changes {module[:80]!r}..., but modules that patterns are matched "
                f"with have names of up to {NAME_LENGTH} characters: load it without patterns."
            )
        self._steps_left -= self._lookup_steps
        if self._steps_left < 0:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: the {len(self._entries)} patterns of {self._field} could take too "
                "long to match with all modules of the adapter: write fewer or simpler ones."
            )
        for pattern, value in self._entries:
            if pattern.match(module):
                return value
        return self._default


def _compile(field: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} has the pattern {pattern[:80]!r}, which is no regular "
            f"expression ({error})."
        ) from None


def _steps(field: str, pattern: str) -> int:
    """An upper bound of the ways in which a pattern can be tried on a module name."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} has a pattern of {len(pattern)} characters, "
            f"{pattern[:80]!r}...: write it with up to {MAX_PATTERN_LENGTH}."
        )
    rest = _ATOM.sub(lambda atom: "(" if atom[0] == "(?:" else "_", pattern)
    if "(?" in rest or _REPEATED_GROUP.search(rest):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} has the pattern {pattern[:80]!r}; repeated groups such as "
            "`(...)*` and extensions such as `(?=...)` are not accepted: write it without them."
        )
    repeats = min(len(_REPEAT.findall(rest)), 8)
    alternatives, groups = rest.count("|") + 1, min(rest.count("(") + 1, 8)
    length = len(pattern) // NAME_LENGTH + 1
    return int(NAME_LENGTH**repeats * alternatives**groups * length)
