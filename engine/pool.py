"""The unified pool's books: which page belongs to whom. Imports no torch.

KV cache and adapter weights take pages from one free list. What is idle (a cached prefix block, an
adapter that nobody uses) stays until the room is needed; then the cheapest to have back goes first,
whatever it is (see `eviction.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from polydelta.engine.eviction import EvictionOrder, EvictionReason


class PageAllocator:
    """Free pages, kept as runs of consecutive ids.

    Single pages are taken from the low end and long runs from the high end, so that adapters tend
    to lie in one piece.
    """

    def __init__(self, num_pages: int, first_page: int = 0) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self.pages = range(first_page, first_page + num_pages)
        # Runs of free pages by their first page, and by the page after their last.
        self._length: dict[int, int] = {first_page: num_pages} if num_pages else {}
        self._start_of_end: dict[int, int] = {self.pages.stop: first_page} if num_pages else {}
        # First pages of runs, lowest on top; some may no longer be a run's first page.
        self._lowest: list[int] = [first_page] if num_pages else []
        self._is_free = bytearray(first_page) + bytearray(b"\x01" * num_pages)

    def take(self, count: int) -> list[int]:
        """`count` pages from the low end. The caller has checked `num_free`."""
        pages: list[int] = []
        while len(pages) < count:
            start = self._lowest[0]
            if start not in self._length:
                heapq.heappop(self._lowest)
                continue
            pages += self._cut(start, min(count - len(pages), self._length[start]))
        return pages

    def take_run(self, count: int) -> list[int]:
        """`count` pages in one piece if there is such a run (the tightest, then the highest), else
        in as few pieces as there can be. The caller has checked `num_free`."""
        pages: list[int] = []
        while len(pages) < count:
            missing = count - len(pages)
            fitting = [
                (length, -start) for start, length in self._length.items() if length >= missing
            ]
            if fitting:
                _, negative_start = min(fitting)
                pages += self._cut_end(-negative_start, missing)
            else:
                start = max(self._length, key=lambda first: (self._length[first], first))
                pages += self._cut(start, self._length[start])
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """Raises ValueError for a page that is free already or never existed."""
        for page in pages:
            if page not in self.pages or self._is_free[page]:
                raise ValueError(f"page {page} is not in use")
            self._is_free[page] = 1
            self.num_free += 1
            self._join(page)

    def is_free(self, page: int) -> bool:
        return bool(self._is_free[page])

    def _cut(self, start: int, count: int) -> list[int]:
        """Takes the first `count` pages of a run."""
        length = self._length.pop(start)
        if count < length:
            self._length[start + count] = length - count
            self._start_of_end[start + length] = start + count
            self._push_start(start + count)
        else:
            del self._start_of_end[start + length]
        return self._taken(start, count)

    def _cut_end(self, start: int, count: int) -> list[int]:
        """Takes the last `count` pages of a run."""
        length = self._length[start]
        if count == length:
            return self._cut(start, count)
        self._length[start] = length - count
        del self._start_of_end[start + length]
        self._start_of_end[start + length - count] = start
        return self._taken(start + length - count, count)

    def _taken(self, start: int, count: int) -> list[int]:
        self._is_free[start : start + count] = bytes(count)
        self.num_free -= count
        return list(range(start, start + count))

    def _join(self, page: int) -> None:
        """Makes a page a run of its own, merged with the free runs on either side."""
        start, length = page, 1
        if page in self._start_of_end:
            start = self._start_of_end.pop(page)
            length += self._length.pop(start)
        if page + 1 in self._length:
            after = self._length.pop(page + 1)
            del self._start_of_end[page + 1 + after]
            length += after
        self._length[start] = length
        self._start_of_end[start + length] = start
        self._push_start(start)

    def _push_start(self, start: int) -> None:
        heapq.heappush(self._lowest, start)
        # Outdated entries go when they come to the top; rebuilt when they outnumber the rest.
        if len(self._lowest) > 2 * len(self._length) + 64:
            self._lowest = list(self._length)
            heapq.heapify(self._lowest)


@dataclass(frozen=True)
class IdlePages:
    """Pages that are kept for what is in them until somebody needs the room."""

    pages: tuple[int, ...]
    # Tells the owner that they are gone, and why.
    forget: Callable[[EvictionReason], None]


class PagePool:
    """The allocator and what may be evicted from it. Ask `can_allocate`, then `allocate`."""

    def __init__(self, num_pages: int, first_page: int = 0) -> None:
        self._allocator = PageAllocator(num_pages, first_page)
        self._order = EvictionOrder()
        self._idle: dict[Hashable, IdlePages] = {}
        self.num_idle = 0

    @property
    def num_pages(self) -> int:
        return self._allocator.num_pages

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_available(self) -> int:
        """Free now, or after evicting everything idle."""
        return self.num_free + self.num_idle

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_available

    def allocate(self, count: int) -> list[int]:
        """Pages anywhere, for KV; evicts what is idle when it must."""
        self._make_room(count)
        return self._allocator.take(count)

    def allocate_run(self, count: int) -> list[int]:
        """Pages in as few pieces as possible, for adapters; evicts what is idle when it must."""
        self._make_room(count)
        return self._allocator.take_run(count)

    def free(self, pages: Sequence[int]) -> None:
        self._allocator.give_back(pages)

    def retire(
        self,
        key: Hashable,
        pages: Sequence[int],
        cost: float,
        uses: int,
        forget: Callable[[EvictionReason], None],
    ) -> None:
        """Hands pages to the pool to keep or evict as it likes.

        cost: seconds that it would take to have them back; uses: what speaks for their being used
        again, 0 for nothing; forget: called when they are evicted, after which the pages belong to
        nobody.
        """
        self._idle[key] = IdlePages(tuple(pages), forget)
        self.num_idle += len(pages)
        self._order.add(key, cost * uses / len(pages))

    def revive(self, key: Hashable) -> tuple[int, ...]:
        """Takes retired pages back into use."""
        self._order.remove(key)
        pages = self._idle.pop(key).pages
        self.num_idle -= len(pages)
        return pages

    def evict(self, key: Hashable, reason: EvictionReason) -> None:
        """Frees retired pages, and tells their owner."""
        forget = self._idle[key].forget
        self.free(self.revive(key))
        forget(reason)

    def check_integrity(self, in_use: Sequence[int]) -> None:
        """Raises RuntimeError unless free, idle and in-use pages are every page exactly once."""
        idle = [page for entry in self._idle.values() for page in entry.pages]
        pages = self._allocator.pages
        free = [page for page in pages if self._allocator.is_free(page)]
        everything = sorted([*in_use, *idle, *free])
        if everything != list(pages):
            raise RuntimeError(
                f"the pool's books do not balance: {len(free)} free + {len(idle)} idle + "
                f"{len(in_use)} in use are not the {self.num_pages} pages once each"
            )

    def _make_room(self, count: int) -> None:
        while self.num_free < count:
            self.evict(self._order.next_victim(), EvictionReason.ROOM)
