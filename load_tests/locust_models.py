"""Which models there are to ask for, and which one is asked for next."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any


class Models:
    """Names in the order of the server's list, and those that users of this process uploaded."""

    def __init__(self, cards: Iterable[Mapping[str, Any]], wanted: Iterable[str] = ()) -> None:
        """cards: the server's model cards. wanted: only these, listed or not; empty: all.

        An adapter is a model with a `parent`; the base is one without. Raises ValueError when no
        model is left.
        """
        parents = {str(card["id"]): card.get("parent") for card in cards}
        self._names = list(wanted) or list(parents)
        if not self._names:
            raise ValueError("The server lists no model: name some with --models.")
        self._bases = {name for name, parent in parents.items() if not parent}
        self._uploaded: set[str] = set()

    def choose(self, alpha: float) -> str:
        """alpha: of the power distribution; the density at x in 0..1 is alpha * x^(alpha - 1)."""
        place = int(random.random() ** (1 / alpha) * len(self._names))
        return self._names[min(place, len(self._names) - 1)]

    def kind(self, name: str) -> str:
        """What statistics are kept by: there may be thousands of names."""
        if name in self._uploaded:
            return "uploaded"
        return "base" if name in self._bases else "adapter"

    def add(self, name: str) -> None:
        """From now on an uploaded adapter is asked for, as often as chance has it."""
        self._uploaded.add(name)
        self._names.insert(random.randint(0, len(self._names)), name)

    def withdraw(self, name: str) -> None:
        """From now on an uploaded adapter is no longer asked for."""
        self._uploaded.discard(name)
        if name in self._names:
            self._names.remove(name)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)
