"""JSON as the files of an adapter must hold it: what Python's parser is too kind to refuse is
refused here, because other readers would see something else.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

# Half of a surrogate pair, escaped: it parses, but no answer that quotes it could be encoded.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(content: bytes) -> Any:
    """The value of a UTF-8 document without NaN, infinities, keys that come twice, or nesting
    deeper than Python's stack.

    Raises ValueError with the reason.
    """
    try:
        value = json.loads(
            content.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{key[:80]!r} is there twice")
            seen.add(key)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
