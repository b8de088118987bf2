"""An adapter as its kernels read it: one table of integers on the device.

    records of site 0 | records of site 1 | ... | page ids

Every site has as many records as the one that has the most, so that a kernel finds them without a
directory. A record is what one delta does: where it lies is said in groups of 64 bytes from the
start of the layer's bytes, and the page ids say where these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from polydelta.kernels.delta_groups import AdapterPlaces, OutputBias, SitePlaces
from polydelta.kernels.delta_weights import (
    AddWeights,
    ChangeWeights,
    ColumnsWeights,
    LowRankWeights,
    Matrix,
    OneBitWeights,
    QuantizedMatrix,
    RowsWeights,
    ScaleWeights,
    SparseWeights,
)
from polydelta.kernels.triton.delta_pages import CHUNK_BYTES, GROUP_BYTES
from polydelta.kernels.upload import upload

# Words of a record; see `Record`.
RECORD_WORDS = 16
# Ranks, columns or rows of one record: larger deltas are cut.
MOST_RANKS = 256
# Of a record that may change any column of y.
MOST_OUT = 2**31 - 1
INDEX_BYTES = 4


class Kind(IntEnum):
    """What is in the place of a record; the kernels know the numbers."""

    NOTHING = 0
    LOW_RANK = 1
    COLUMNS = 2
    ROWS = 3
    SPARSE = 4
    ONE_BIT = 5
    SCALE = 6
    BIAS = 7


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix: where the first one starts, and from row to row, in groups; of bits in
    chunks of 16 bytes."""

    start: int = 0
    stride: int = 0
    # Of a code where the matrix is quantised, else 0
    bits: int = 0
    scales: int = 0
    scales_stride: int = 0

    def after(self, count: int) -> Rows:
        """Those that begin so many rows later."""
        start, scales = self.start + count * self.stride, self.scales + count * self.scales_stride
        return replace(self, start=start, scales=scales)


@dataclass(frozen=True)
class Record:
    """Its words, in this order, after the number of the layer's first page in the pool."""

    kind: Kind
    # Columns of y: out_start : out_start + out_features.
    out_start: int
    out_features: int
    # Ranks of LOW_RANK, indices of COLUMNS and ROWS.
    count: int = 0
    # A of LOW_RANK and ROWS, indices of COLUMNS, row pointers of SPARSE, bits of ONE_BIT, a vector
    a: Rows = Rows()
    # B of LOW_RANK and COLUMNS, indices of ROWS, columns of SPARSE, the scale of ONE_BIT
    b: Rows = Rows()
    # Values of SPARSE
    c: int = 0

    def words(self) -> list[int]:
        a, b = self.a, self.b
        words = [self.kind, 0, self.out_start, self.out_features, self.count]
        words += [a.start, a.stride, b.start, b.stride, self.c]
        return [*words, a.bits, a.scales, a.scales_stride, b.bits, b.scales, b.scales_stride]


@dataclass(frozen=True, eq=False)
class AdapterTable:
    # [sites * site_words + pages] int32
    words: Tensor
    # Of the records of one site.
    site_words: int
    # Where the page ids begin.
    first_page: int
    # Kinds of which it has any.
    kinds: frozenset[Kind]


def encode(places: AdapterPlaces, device: torch.device) -> AdapterTable | None:
    """None where it has deltas that are not read through page tables."""
    # Most layers have the same deltas at the same places, and share them.
    known: dict[tuple[int, int, int], int] = {}
    distinct: list[list[Record]] = [[]]
    which, layers = [], []
    for site in places.sites:
        layers.append(0 if site is None else site.layer)
        if site is None:
            which.append(0)
            continue
        key = id(site.changes), id(site.adds), id(site.biases)
        if key not in known:
            records = _site_records(site)
            if records is None:
                return None
            known[key] = len(distinct)
            distinct.append(records)
        which.append(known[key])
    most = max(1, *map(len, distinct))
    empty = [0] * RECORD_WORDS
    words = torch.tensor(
        [
            [record.words() for record in records] + [empty] * (most - len(records))
            for records in distinct
        ],
        dtype=torch.int32,
    )
    # [sites, most, RECORD_WORDS]
    by_site = words[torch.tensor(which, dtype=torch.int64)]
    num_pages = places.storage.shape[1]
    by_site[:, :, 1] = torch.tensor(layers, dtype=torch.int32).unsqueeze(1) * num_pages
    pages = torch.tensor(places.pages, dtype=torch.int32)
    return AdapterTable(
        upload(torch.cat((by_site.flatten(), pages)), device, torch.int32),
        most * RECORD_WORDS,
        by_site.numel(),
        frozenset(record.kind for records in distinct for record in records),
    )


def _site_records(site: SitePlaces) -> list[Record] | None:
    records: list[Record] = []
    for weights in (*site.changes, *site.adds, *site.biases):
        encoded = _records(weights)
        if encoded is None:
            return None
        records += encoded
    return records


def _records(weights: ChangeWeights | AddWeights | OutputBias) -> list[Record] | None:
    match weights:
        case LowRankWeights():
            return list(_low_rank(weights))
        case ColumnsWeights(out_start, indices, block_t):
            out, a, b = block_t.shape[1], _vector(indices), _matrix(block_t)
            return [
                Record(Kind.COLUMNS, out_start, out, stop - start, _from(a, start), b.after(start))
                for start, stop in _cut(len(indices))
            ]
        case RowsWeights(indices, block):
            a, b = _matrix(block), _vector(indices)
            return [
                # Rows of the whole fused layer.
                Record(Kind.ROWS, 0, MOST_OUT, stop - start, a.after(start), _from(b, start))
                for start, stop in _cut(len(indices))
            ]
        case SparseWeights(row_pointers, columns, values):
            a, b, c = _vector(row_pointers), _vector(columns), _vector(values).start
            return [Record(Kind.SPARSE, 0, len(row_pointers) - 1, 0, a, b, c)]
        case OneBitWeights(out_start, bits, scale):
            a = Rows(_vector(bits).start, bits.stride(0) // CHUNK_BYTES)
            return [Record(Kind.ONE_BIT, out_start, len(bits), 0, a, _vector(scale))]
        case ScaleWeights(out_start, vector):
            return [Record(Kind.SCALE, out_start, len(vector), 0, _vector(vector))]
        case OutputBias(start, vector):
            return [Record(Kind.BIAS, start, len(vector), 0, _vector(vector))]
        case _:
            return None


def _low_rank(weights: LowRankWeights) -> Iterator[Record]:
    """A part's ranks after those of the part before it, so that a program meets only its own."""
    for block in weights.blocks:
        rank, out = block.b_t.shape
        a, b = _matrix(weights.a).after(block.rank_start), _matrix(block.b_t)
        for start, stop in _cut(rank):
            count = stop - start
            yield Record(Kind.LOW_RANK, block.out_start, out, count, a.after(start), b.after(start))


def _cut(count: int) -> Sequence[tuple[int, int]]:
    """start : stop of pieces."""
    return [(start, min(count, start + MOST_RANKS)) for start in range(0, count, MOST_RANKS)]


def _matrix(matrix: Matrix) -> Rows:
    if isinstance(matrix, QuantizedMatrix):
        codes, scales = _matrix(matrix.codes), _matrix(matrix.scales)
        return replace(codes, bits=matrix.bits, scales=scales.start, scales_stride=scales.stride)
    return Rows(_vector(matrix).start, matrix.stride(0) * matrix.itemsize // GROUP_BYTES)


def _vector(tensor: Tensor) -> Rows:
    return Rows(tensor.storage_offset() * tensor.itemsize // GROUP_BYTES)


def _from(indices: Rows, start: int) -> Rows:
    """Those of int32 indices that begin at a multiple of MOST_RANKS."""
    return Rows(indices.start + start * INDEX_BYTES // GROUP_BYTES)
