"""Adapters that are meant by globs of their ids, such as `acme-*`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

EVERY_ID = ("*",)


def matches(adapter_id: str, globs: Iterable[str]) -> bool:
    """Whether an id is one of those that are meant."""
    return any(fnmatchcase(adapter_id, glob) for glob in globs)


def beginning(glob: str) -> str:
    """What every id that matches begins with."""
    return re.split(r"[*?[]", glob, maxsplit=1)[0]


def is_simple(glob: str) -> bool:
    """Whether it is an id, or means every id that begins like it."""
    return glob.removesuffix("*") == beginning(glob)
