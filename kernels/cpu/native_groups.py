"""All adapters of a step on one linear layer in one call of `groups.c`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.kernels.cpu.deltas import FewRowsDelta, NativeChange
from polydelta.kernels.cpu.native import Field, NativeLibrary, NativePool, Struct, float_bits
from polydelta.kernels.cpu.native_deltas import NativeDelta, bind_bias
from polydelta.kernels.cpu.native_pages import CopiedLayers, PagedSites
from polydelta.kernels.cpu.panels import PanelLinear
from polydelta.kernels.delta_groups import DeltaGroup, DeltaSegment, Linear, SegmentLoop, SiteDeltas

# Where the compiled kernels know no bound.
_ANY_NUMBER = 2**62


class NativeSites:
    """An adapter's deltas in the structs that `step_adapters.c` describes."""

    def __init__(
        self,
        sites: Sequence[SiteDeltas | None],
        library: NativeLibrary,
        copied: CopiedLayers | None = None,
    ) -> None:
        """copied: where it lies in the pool, if the deltas are bound to a copy of one layer."""
        self._sites = sites if copied is None else copied.others
        # Whether a weight in a sum can be given, numbers of all matrices, and rows at most.
        self.only_low_rank = True
        self.size = 0
        self.most_rows = _ANY_NUMBER
        layers = [0] * len(sites) if copied is None else copied.layers
        # Layers may share theirs.
        known: dict[int, Struct | None] = {id(None): None}
        bound: list[Field] = []
        for deltas, layer in zip(sites, layers, strict=True):
            if deltas is not None and id(deltas) not in known:
                known[id(deltas)] = self._struct(deltas, library)
            bound += (known[id(deltas)], layer)
        where = (None, 0, None, 0, 0, None, None) if copied is None else copied.fields
        self._adapter = Struct((Struct(bound), *where))

    def __getitem__(self, site: int) -> SiteDeltas | None:
        return self._sites[site]

    @property
    def address(self) -> int:
        return self._adapter.address

    def _struct(self, deltas: SiteDeltas, library: NativeLibrary) -> Struct | None:
        """None where torch must compute them."""
        each: list[NativeDelta] = []
        for step in (*deltas.changes, *deltas.adds):
            if not isinstance(step, FewRowsDelta | NativeChange):
                self.most_rows = 0
                return None
            each.append(step.native)
            self.size += step.native.size
        each += [bind_bias(library, bias) for bias in deltas.biases]
        low_rank = all(delta.is_low_rank for delta in each)
        if not low_rank:
            self.only_low_rank = False
            limits = [add.most_rows for add in deltas.adds if isinstance(add, FewRowsDelta)]
            self.most_rows = min([self.most_rows, *limits])
        fields: list[Field] = []
        for delta in each:
            scratch = delta.scratch
            function = None if low_rank else delta.function
            fields += (function, delta.struct)
            fields += (scratch.per_number, scratch.per_row, scratch.per_column, scratch.once)
        return Struct((low_rank, len(each), Struct(fields), 0, 0))


class NativeGroup:
    """The segments that `groups.c` can take, and a loop over the others; over all of them where y
    is not bfloat16 or columns are not adjacent."""

    def __init__(
        self, pool: NativePool, fast: Sequence[DeltaSegment], others: Sequence[DeltaSegment]
    ) -> None:
        """fast: their sites are NativeSites or PagedSites."""
        self._pool = pool
        # What applies nothing has no call that a replay could repeat for another.
        self.recordable = bool(fast) and not others
        self._others = SegmentLoop(others) if others else None
        self._all = SegmentLoop([*fast, *others])
        self._fast = fast
        # The largest first: whoever is done with them finds small ones to even out the threads.
        fast = sorted(fast, key=lambda segment: -_size(segment))
        turns: Counter[int] = Counter()
        fields: list[int] = []
        for segment in fast:
            rows, sites = segment.stop - segment.start, segment.sites
            address = sites.address if isinstance(sites, NativeSites | PagedSites) else 0
            fields += (segment.start, rows, turns[segment.start], address)
            fields.append(float_bits(segment.weight))
            turns[segment.start] += 1
        num_turns = max(turns.values(), default=0)
        self._struct = Struct((Struct(fields), len(fast), num_turns))

    def assume(self, other: NativeGroup) -> None:
        """Takes the segments of another group in the place of its own; both are `recordable`."""
        self._fast, self._all = other._fast, other._all
        self._struct.assume(other._struct)

    def multiply(self, site: int, linear: Linear, x: Tensor) -> Tensor:
        if self._others or not isinstance(linear, PanelLinear):
            y = linear(x)
            self.apply(site, y, x)
            return y
        y, product = linear.product(x)
        self._pool.call("multiply_group", *product, *self._fields(site, y, x))
        return y

    def _fields(self, site: int, y: Tensor, x: Tensor) -> tuple[Field, ...]:
        """Of the struct `Group`."""
        return self._struct, site, y, y.stride(0), x, x.stride(0), x.shape[1]

    def apply(self, site: int, y: Tensor, x: Tensor) -> None:
        if y.dtype != torch.bfloat16 or not y.stride(1) == x.stride(1) == 1:
            self._all.apply(site, y, x)
            return
        if self._fast:
            self._pool.call("add_group", *self._fields(site, y, x))
        if self._others:
            self._others.apply(site, y, x)


def group(pool: NativePool, segments: Sequence[DeltaSegment]) -> DeltaGroup:
    """See `ops.Kernels.group_deltas`."""
    fast = [segment for segment in segments if _is_fast(segment)]
    return NativeGroup(pool, fast, [segment for segment in segments if not _is_fast(segment)])


def _size(segment: DeltaSegment) -> int:
    sites = segment.sites
    return sites.size if isinstance(sites, NativeSites | PagedSites) else 0


def _is_fast(segment: DeltaSegment) -> bool:
    sites = segment.sites
    return isinstance(sites, PagedSites) or (
        isinstance(sites, NativeSites)
        and segment.stop - segment.start <= sites.most_rows
        and (segment.weight == 1.0 or sites.only_low_rank)
    )
