"""An adapter in host RAM as the pool sees it, and what its pages are for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from polydelta.adapters_store.traits import AdapterTraits


class HostAdapter(Protocol):
    """An adapter in host RAM, packed for the pool."""

    @property
    def digest(self) -> str: ...

    @property
    def traits(self) -> AdapterTraits: ...

    @property
    def bytes_per_layer(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class AdapterPages:
    """How many pages of the pool an adapter takes: those of its weights first, then those of the
    KV that it puts before a sequence."""

    weights: int = 0
    # Laid out as all KV is: page i holds virtual tokens i * block_size and on.
    prefix: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.prefix


def count_pages(packed: HostAdapter, page_bytes: int, block_size: int) -> AdapterPages:
    """page_bytes: of one layer; block_size: tokens of KV in a page.

    An adapter with neither weights nor KV in the pool still takes a page: what is resident has a
    place in the pool's books, and leaves by being evicted from there.
    """
    prefix = -(-packed.traits.num_prefix_tokens // block_size)
    weights = -(-packed.bytes_per_layer // page_bytes)
    return AdapterPages(weights if prefix else max(1, weights), prefix)
