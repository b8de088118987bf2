"""The memory of KV cache and adapters: one pool, or for comparison two. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polydelta.engine.pool import PagePool


def kv_pages_of(num_pages: int, adapter_share: float | None) -> int:
    """Of all pages, those that KV may have; adapter_share as in `Pools.of`."""
    return round(num_pages * (1 - (adapter_share or 0.0)))


@dataclass(frozen=True)
class Pools:
    """Where each of the two takes its pages from: the same pool, unless it was split."""

    kv: PagePool
    adapters: PagePool

    @staticmethod
    def of(num_pages: int, adapter_share: float | None = None) -> Pools:
        """adapter_share: of all pages, those that only adapters have; None for one pool."""
        if adapter_share is None:
            pool = PagePool(num_pages)
            return Pools(pool, pool)
        kv = PagePool(kv_pages_of(num_pages, adapter_share))
        return Pools(kv, PagePool(num_pages - kv.num_pages, first_page=kv.num_pages))

    @property
    def are_one(self) -> bool:
        return self.kv is self.adapters

    @property
    def num_pages(self) -> int:
        return self.kv.num_pages + (0 if self.are_one else self.adapters.num_pages)

    @property
    def num_free(self) -> int:
        return self.kv.num_free + (0 if self.are_one else self.adapters.num_free)

    @property
    def num_idle(self) -> int:
        return self.kv.num_idle + (0 if self.are_one else self.adapters.num_idle)

    def can_allocate(self, kv_pages: int, adapter_pages: int) -> bool:
        """Whether both can be had together, evicting what is idle."""
        if self.are_one:
            return self.kv.can_allocate(kv_pages + adapter_pages)
        return self.kv.can_allocate(kv_pages) and self.adapters.can_allocate(adapter_pages)

    def fit(self, kv_pages: int, adapter_pages: int) -> bool:
        """Whether both would fit together if nobody else had a page."""
        if self.are_one:
            return kv_pages + adapter_pages <= self.num_pages
        return kv_pages <= self.kv.num_pages and adapter_pages <= self.adapters.num_pages

    def check_integrity(self, kv_in_use: Sequence[int], adapters_in_use: Sequence[int]) -> None:
        """Raises RuntimeError unless free, idle and in-use pages are every page exactly once."""
        if self.are_one:
            self.kv.check_integrity([*kv_in_use, *adapters_in_use])
        else:
            self.kv.check_integrity(kv_in_use)
            self.adapters.check_integrity(adapters_in_use)
