"""What the table of an adapter says, word by word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from polydelta.kernels.delta_groups import AdapterPlaces, SitePlaces
from polydelta.kernels.triton import adapter_table
from polydelta.kernels.triton.adapter_table import RECORD_WORDS, AdapterTable, Kind, encode

BF16 = torch.bfloat16
Packers = dict[str, Callable[..., Any]]


def records(table: AdapterTable, site: int) -> list[list[int]]:
    """Those that there are."""
    start = site * table.site_words
    words = table.words[start : start + table.site_words].view(-1, RECORD_WORDS).tolist()
    return [record for record in words if record[0] != Kind.NOTHING]


def encoded(places: AdapterPlaces) -> AdapterTable:
    table = encode(places, torch.device("cpu"))
    assert table is not None
    return table


def test_a_low_rank_delta_has_a_record_for_each_part(adapter_pool: Any, packers: Packers) -> None:
    adapter = adapter_pool(BF16, torch.device("cpu")).add(
        [packers["low_rank"](70, (0, 40, 3), (40, 33, 2))]
    )
    weights = adapter.places.sites[0].adds[0]
    q, k = records(encoded(adapter.places), 0)
    # 70 numbers of 2 bytes take 3 groups of 64 bytes, 40 and 33 take 2.
    a = weights.a.storage_offset() * 2 // 64
    b_q, b_k = (block.b_t.storage_offset() * 2 // 64 for block in weights.blocks)
    assert q[:9] == [Kind.LOW_RANK, 0, 0, 40, 3, a, 3, b_q, 2]
    assert k[:9] == [Kind.LOW_RANK, 0, 40, 33, 2, a + 3 * 3, 3, b_k, 2]


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_are_found(bits: int, adapter_pool: Any, packers: Packers) -> None:
    adapter = adapter_pool(BF16, torch.device("cpu")).add(
        [packers["low_rank"](70, (0, 40, 3), (40, 33, 2))], bits=bits
    )
    weights = adapter.places.sites[0].adds[0]
    codes, scales = weights.a.codes, weights.a.scales
    _, k = records(encoded(adapter.places), 0)
    assert k[5] == codes.storage_offset() // 64 + 3 * codes.stride(0) // 64
    assert k[10] == bits
    assert k[11] == (scales.storage_offset() + 3 * scales.stride(0)) * 2 // 64
    assert k[12] == scales.stride(0) * 2 // 64
    assert k[13] == bits


def test_changes_come_first_and_biases_last(adapter_pool: Any, packers: Packers) -> None:
    adapter = adapter_pool(BF16, torch.device("cpu")).add(
        [
            packers["bias"](5, 30),
            packers["sparse"](70, 64),
            packers["scale"](0, 64),
            packers["one_bit"](70, 2, 60),
            packers["rows"](70, 64, 4),
            packers["columns"](70, 0, 64, 5),
        ]
    )
    table = encoded(adapter.places)
    kinds = [record[0] for record in records(table, 0)]
    assert kinds == [
        Kind.SCALE, Kind.SPARSE, Kind.ONE_BIT, Kind.ROWS, Kind.COLUMNS, Kind.BIAS,
    ]  # fmt: skip
    assert table.kinds == set(kinds)


@pytest.mark.parametrize("rank", [256, 257, 600])
def test_more_ranks_than_a_record_has_are_cut(
    rank: int, adapter_pool: Any, packers: Packers
) -> None:
    adapter = adapter_pool(BF16, torch.device("cpu")).add([packers["low_rank"](32, (0, 32, rank))])
    cut = records(encoded(adapter.places), 0)
    assert sum(record[4] for record in cut) == rank
    assert max(record[4] for record in cut) <= 256
    # Rows of one group each.
    assert [record[5] - cut[0][5] for record in cut] == list(range(0, rank, 256))
    assert [record[7] - cut[0][7] for record in cut] == list(range(0, rank, 256))


def test_pages_follow_and_each_layer_has_its_own(adapter_pool: Any, packers: Packers) -> None:
    pool = adapter_pool(BF16, torch.device("cpu"), layers=3, num_pages=50)
    adapter = pool.add([packers["bias"](0, 9)], [], [packers["bias"](0, 9), packers["scale"](0, 9)])
    table = encoded(adapter.places)
    assert table.site_words == 2 * RECORD_WORDS
    assert table.first_page == 3 * table.site_words
    assert table.words[table.first_page :].tolist() == adapter.places.pages
    assert [record[1] for record in records(table, 0)] == [0]
    assert records(table, 1) == []
    assert [record[1] for record in records(table, 2)] == [100, 100]


def test_places_that_layers_share_are_encoded_once(
    adapter_pool: Any, packers: Packers, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_pool(BF16, torch.device("cpu"), layers=32).add([packers["bias"](0, 9)])
    site = adapter.places.sites[0]
    calls: list[SitePlaces] = []
    encode_site = adapter_table._site_records
    monkeypatch.setattr(
        adapter_table, "_site_records", lambda site: (calls.append(site), encode_site(site))[1]
    )
    sites: Sequence[SitePlaces] = [site.in_layer(layer) for layer in range(32)]
    table = encoded(AdapterPlaces(adapter.places.storage, adapter.places.pages, sites, BF16))
    assert len(calls) == 1
    first_pages = [records(table, layer)[0][1] for layer in range(32)]
    assert first_pages == [layer * adapter.places.storage.shape[1] for layer in range(32)]


def test_kinds_that_are_not_read_in_place_have_no_table(
    adapter_pool: Any, packers: Packers
) -> None:
    pool = adapter_pool(BF16, torch.device("cpu"), layers=2)
    adapter = pool.add([packers["bias"](0, 9)], [packers["kronecker"](5, 4, 3, 6)])
    assert encode(adapter.places, torch.device("cpu")) is None


def test_an_adapter_without_deltas_has_empty_records(adapter_pool: Any) -> None:
    storage = torch.zeros(1, 4, 192, dtype=torch.uint8)
    table = encoded(AdapterPlaces(storage, [2], [None, None], BF16))
    assert records(table, 0) == records(table, 1) == []
    assert table.words[table.first_page :].tolist() == [2]
