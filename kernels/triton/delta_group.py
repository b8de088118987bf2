"""All adapters of a step, each read where its pages lie."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.kernels.delta_groups import (
    AdapterPlaces,
    AdapterSites,
    DeltaGroup,
    DeltaSegment,
    Linear,
    SegmentLoop,
    SiteDeltas,
)
from polydelta.kernels.triton.adapter_table import AdapterTable, Kind, encode
from polydelta.kernels.triton.deltas import (
    ENTRY_WORDS,
    FEW_ROWS,
    MANY_ROWS,
    SLOT_WORDS,
    Pool,
    apply_deltas,
)
from polydelta.kernels.triton.device_ints import StaticInts

# Rows of a step that can be recorded, and entries of its sums besides the first of each.
MOST_ROWS = 256
MOST_FURTHER = 256
# Shorter segments are applied row by row: a decode step has one row of a sequence, and what comes
# out for it is then the same whoever else wants its adapter. Longer ones go to tensor cores.
SHORT = 16


@dataclass(frozen=True, eq=False)
class PagedSites:
    """An adapter in the pool. None in the place of the table: it is not read through pages."""

    table: AdapterTable | None
    pool: Pool
    # The same deltas, one after the other.
    others: AdapterSites
    # Where it has any.
    sites: frozenset[int]

    def __getitem__(self, site: int) -> SiteDeltas | None:
        return self.others[site]


def bind_pages(places: AdapterPlaces, others: AdapterSites, device: torch.device) -> PagedSites:
    """See `ops.PagedKernels.bind_pages`. The adapter's bytes need not be in the pool yet."""
    sites = (number for number, site in enumerate(places.sites) if site is not None)
    pool = Pool.of(places.storage, places.dtype)
    return PagedSites(encode(places, device), pool, others, frozenset(sites))


def group(segments: Sequence[DeltaSegment], device: torch.device) -> DeltaGroup:
    """See `ops.Kernels.group_deltas`."""
    # By rows: those of a sum go together.
    sums: defaultdict[tuple[int, int], list[DeltaSegment]] = defaultdict(list)
    for segment in segments:
        sums[segment.start, segment.stop].append(segment)
    tables = (s.sites for s in segments if isinstance(s.sites, PagedSites) and s.sites.table)
    pool = next((sites.pool for sites in tables), None)
    if pool is None:
        return SegmentLoop(segments)
    paged = {
        rows: [(s.sites, s.weight) for s in each if isinstance(s.sites, PagedSites)]
        for rows, each in sums.items()
        if all(_is_paged(segment, pool) for segment in each)
    }
    others = [s for s in segments if (s.start, s.stop) not in paged]
    return PagedGroup(segments, paged, others, pool, device)


class PagedGroup:
    """Segments that are applied in one launch a site, and a loop over the others; over all of them
    where x or y is not what the kernel takes."""

    def __init__(
        self,
        segments: Sequence[DeltaSegment],
        paged: dict[tuple[int, int], list[tuple[PagedSites, float]]],
        others: Sequence[DeltaSegment],
        pool: Pool,
        device: torch.device,
    ) -> None:
        """segments: all of them; paged: adapters and weights by start and stop of their rows."""
        self._all = SegmentLoop(segments)
        self._others = SegmentLoop(others) if others else None
        self._pool = pool
        last = max(stop for _, stop in paged)
        self._rows = FEW_ROWS if last <= MOST_ROWS else MANY_ROWS
        slots = [
            (start, rows, entries)
            for (first, stop), entries in paged.items()
            for start, rows in _cut(first, stop, self._rows)
        ]
        further = sum(len(entries) - 1 for _, _, entries in slots)
        self.recordable = not others and last <= MOST_ROWS and further <= MOST_FURTHER
        self._num_slots = MOST_ROWS if self.recordable else len(slots)
        capacity = self._num_slots * SLOT_WORDS
        capacity += ENTRY_WORDS * (MOST_FURTHER if self.recordable else further)
        self._steps = StaticInts(_words(slots, self._num_slots), capacity, device)
        self._sites = frozenset(
            site for entries in paged.values() for sites, _ in entries for site in sites.sites
        )
        # Whether the kernel reads x by columns, of many rows at a time.
        self._reads_columns = not self.recordable and any(
            stop - start >= SHORT and _has(entries, Kind.SPARSE)
            for (start, stop), entries in paged.items()
        )

    def assume(self, other: PagedGroup) -> None:
        """Takes the segments of another group in the place of its own; both are `recordable`."""
        self._all, self._sites = other._all, other._sites
        self._steps.assume(other._steps)

    def multiply(self, site: int, linear: Linear, x: Tensor) -> Tensor:
        y = linear(x)
        self.apply(site, y, x)
        return y

    def apply(self, site: int, y: Tensor, x: Tensor) -> None:
        dtype = self._pool.numbers.dtype
        if not (x.dtype == y.dtype == dtype and x.stride(1) == y.stride(1) == 1):
            self._all.apply(site, y, x)
            return
        # Another group may have deltas where this one has none.
        if self.recordable or site in self._sites:
            columns = x.T.contiguous().T if self._reads_columns else x
            slots = min(len(x), self._num_slots)
            apply_deltas(y, x, columns, self._pool, self._steps.tensor, slots, self._rows, site)
        if self._others is not None:
            self._others.apply(site, y, x)


def _is_paged(segment: DeltaSegment, pool: Pool) -> bool:
    sites = segment.sites
    return isinstance(sites, PagedSites) and sites.table is not None and sites.pool.is_like(pool)


def _has(entries: Sequence[tuple[PagedSites, float]], kind: Kind) -> bool:
    return any(sites.table is not None and kind in sites.table.kinds for sites, _ in entries)


def _cut(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each slot of a segment."""
    step = 1 if stop - start < SHORT else most
    for first in range(start, stop, step):
        yield first, min(step, stop - first)


def _words(
    slots: Sequence[tuple[int, int, Sequence[tuple[PagedSites, float]]]], num_slots: int
) -> list[int]:
    """As `deltas.py` reads them. num_slots: with those that are empty."""
    words: list[int] = []
    further: list[int] = []
    for start, rows, entries in slots:
        first, *rest = (_entry(sites, weight) for sites, weight in entries)
        words += (start, rows, len(entries), num_slots * SLOT_WORDS + len(further), *first)
        for entry in rest:
            further += entry
    words += [0] * (num_slots * SLOT_WORDS - len(words))
    return words + further


def _entry(sites: PagedSites, weight: float) -> tuple[int, ...]:
    table = sites.table
    assert table is not None
    address = table.words.data_ptr()
    packed = struct.pack("<qfii", address, weight, table.site_words, table.first_page)
    return struct.unpack(f"<{ENTRY_WORDS}i", packed)
