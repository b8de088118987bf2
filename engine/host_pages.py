"""Pages of KV in host RAM, as the books see them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol


class HostPages(Protocol):
    """A bounded number of pages in host RAM; `host_kv.py` has them."""

    @property
    def page_bytes(self) -> int:
        """Of one page, all layers together."""

    @property
    def num_free(self) -> int: ...

    @property
    def num_used(self) -> int: ...

    def save(self, pages: Seq[int]) -> list[int]:
        """Copies pages of the pool to host pages, which it returns; `num_free` was asked."""

    def restore(self, saved: Seq[int], pages: Seq[int]) -> None:
        """Copies host pages to pages of the pool, in their order."""

    def drop(self, saved: Seq[int]) -> None:
        """Host pages are free again."""


@dataclass(frozen=True)
class DistantPages:
    """Host pages that sequences read where they lie: their ids in block tables follow those of the
    pool's pages."""

    host: HostPages
    # Pages of the pool, KV's and adapters'.
    first_page: int

    def take(self, pages: Seq[int]) -> list[int]:
        """Copies the first of these pages of the pool, as many as have room; the ids of the
        copies."""
        first = pages[: self.host.num_free]
        return [self.first_page + page for page in self.host.save(first)] if first else []

    def has(self, page: int) -> bool:
        """Whether an id is of one of these."""
        return page >= self.first_page

    def drop(self, page: int) -> None:
        self.host.drop([page - self.first_page])
