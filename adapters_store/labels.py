"""Labels: what owners write on their adapters, to find them again."""

from __future__ import annotations

import re
from collections.abc import Mapping

from polydelta.adapters_store.errors import InvalidAdapterError

MAX_LABELS = 32
MAX_VALUE_LENGTH = 256
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels themselves. Raises InvalidAdapterError."""
    if len(labels) > MAX_LABELS:
        raise InvalidAdapterError(
            f"labels: here are {len(labels)}, but a version has at most {MAX_LABELS}."
        )
    for key, value in labels.items():
        if not _KEY.fullmatch(key):
            raise InvalidAdapterError(
                f"labels: the key {key[:200]!r} is not accepted: use 1 to 63 letters, digits, "
                "dots, hyphens, slashes and underscores, a letter or digit first."
            )
        if not isinstance(value, str) or len(value) > MAX_VALUE_LENGTH or not value.isprintable():
            raise InvalidAdapterError(
                f"labels: the value of {key!r} must be printable text of up to {MAX_VALUE_LENGTH} "
                "characters."
            )
    return dict(labels)
