"""What the engine's scheduler must know of an adapter. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterTraits:
    """How an adapter acts on a whole sequence."""

    # Virtual tokens with ready-made keys and values before the sequence, whose first token is at
    # this position then.
    num_prefix_tokens: int = 0
    # The adapter acts from the last occurrence of these tokens in the prompt on, and not at all
    # where they do not occur; empty: it acts on every token.
    invocation: tuple[int, ...] = ()
