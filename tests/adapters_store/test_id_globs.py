"""Adapters that are meant by globs of their ids, and what the catalog finds of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from polydelta.adapters_store.catalog import Catalog
from polydelta.adapters_store.id_globs import EVERY_ID, beginning, is_simple, matches
from polydelta.adapters_store.records import AdapterFacts, AdapterRecord, Source

IDS = ["A", "a", "a-1", "a-12", "a-2", "a.b", "ab", "abc", "a_b", "b", "b-1", "zz", "Zz-9"]
GLOBS = ["*", "a", "a*", "a-*", "a-?", "*b", "[ab]", "a[!b]*", "?-1", "a-1*2", "zz", "Z*", "a_*"]
places = st.sampled_from(["", "a", "a-2", "b", "zz"])
some_globs = st.lists(st.sampled_from(GLOBS), max_size=4).map(tuple)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """Two versions of each id; contents of 1, 2, 4, ... bytes, by id."""
    path: Path = tmp_path_factory.mktemp("catalog") / "catalog.db"
    catalog = Catalog(f"sqlite:///{path}")
    for number, adapter_id in enumerate(IDS):
        facts = AdapterFacts("LORA", ("LowRank",), 1, 1, 1 << number)
        for _ in range(2):
            catalog.add(
                AdapterRecord(adapter_id, 0, f"{number:064}", facts, "base", 1.0, Source.UPLOAD)
            )
    yield catalog
    catalog.close()


@pytest.mark.parametrize(
    ("glob", "first", "simple"),
    [
        ("*", "", True),
        ("acme-*", "acme-", True),
        ("acme", "acme", True),
        ("acme-*-x", "acme-", False),
        ("acme-?", "acme-", False),
        ("[ab]*", "", False),
        ("a**", "a", False),
    ],
)
def test_a_glob_has_a_beginning_and_may_be_simple(glob: str, first: str, simple: bool) -> None:
    assert (beginning(glob), is_simple(glob)) == (first, simple)


@pytest.mark.parametrize("adapter_id", IDS)
def test_upper_and_lower_case_are_two_things(adapter_id: str) -> None:
    assert matches(adapter_id, (adapter_id,))
    assert not matches(adapter_id, (adapter_id.swapcase(),))
    assert not matches(adapter_id, ())


@given(globs=some_globs, after=places, limit=st.integers(1, 5))
def test_a_page_has_the_ids_that_match_and_is_full(
    catalog: Catalog, globs: tuple[str, ...], after: str, limit: int
) -> None:
    wanted = [each for each in sorted(IDS) if matches(each, globs) and each > after]
    for kind in (None, "LowRank"):
        found = catalog.page(after, limit, {}, kind, globs)
        assert [record.name for record in found] == [f"{each}@2" for each in wanted[:limit]]


@given(globs=some_globs)
def test_ids_and_contents_are_those_that_match(catalog: Catalog, globs: tuple[str, ...]) -> None:
    wanted = {each for each in IDS if matches(each, globs)}
    assert catalog.known(globs) == catalog.ready(globs) == wanted
    sizes = {f"{IDS.index(each):064}": 1 << IDS.index(each) for each in wanted}
    assert catalog.contents(globs) == sizes


def test_every_id_matches_by_default(catalog: Catalog) -> None:
    assert catalog.ready() == catalog.ready(EVERY_ID) == set(IDS)
    assert len(catalog.page("", 100, {}, None)) == len(IDS)
    assert sum(catalog.contents(EVERY_ID).values()) == catalog.total_bytes()
