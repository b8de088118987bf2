"""Over SQLite, and over PostgreSQL where POLYDELTA_TEST_POSTGRES has the URL of a database that may
be emptied."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from polydelta.adapters_store.catalog import Catalog
from polydelta.adapters_store.catalog_tables import SCHEMA
from polydelta.adapters_store.errors import StoreError, UnknownAdapterError
from polydelta.adapters_store.records import (
    AdapterFacts,
    AdapterRecord,
    Part,
    Source,
    VersionState,
)

POSTGRES = "POLYDELTA_TEST_POSTGRES"
TABLES = ("polydelta_versions", "polydelta_adapters", "polydelta_schema")


def execute(url: str, *statements: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'catalog.db'}"
        return
    if POSTGRES not in os.environ:
        pytest.skip(f"{POSTGRES} has no URL of a PostgreSQL database that may be emptied")
    url = os.environ[POSTGRES]
    drop = [f"DROP TABLE IF EXISTS {table}" for table in TABLES]
    execute(url, *drop)
    yield url
    execute(url, *drop)


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    catalog = Catalog(url)
    yield catalog
    catalog.close()


def record(adapter_id: str = "sql", digest: str = "a", **values: Any) -> AdapterRecord:
    """digest: repeated to its length."""
    facts = AdapterFacts(
        values.pop("format", "LORA"),
        values.pop("kinds", ("LowRank",)),
        values.pop("rank", 3),
        modules=5,
        nbytes=values.pop("nbytes", 70),
    )
    values = {"source": Source.UPLOAD} | values
    return AdapterRecord(adapter_id, 0, digest * 64, facts, "base", 1234.5, **values)


def names(records: list[AdapterRecord]) -> list[str]:
    return [record.name for record in records]


def page(catalog: Catalog, **values: Any) -> list[str]:
    return names(catalog.page(**{"after": "", "limit": 100, "labels": {}, "kind": None} | values))


def test_a_record_comes_back_as_it_was_added_but_for_its_number(catalog: Catalog) -> None:
    given = record(
        "sum",
        format="COMPOSITION",
        kinds=("LowRank", "Sparse"),
        rank=0,
        nbytes=1 << 40,
        source=Source.COMPOSITION,
        labels={"team": "ü 'x'", "a.b/c-d_e": ""},
        pinned=True,
        uses=1 << 40,
        last_used=5.25,
        parts=(Part("a", 3, 0.1), Part("b", 1, -2e300)),
    )
    added = catalog.add(given)
    assert added.version == 1
    assert catalog.find("sum", 1) == catalog.newest("sum") == added
    assert added == AdapterRecord(**vars(given) | {"version": 1})


def test_versions_count_from_one_for_each_id(catalog: Catalog) -> None:
    added = [catalog.add(record(name)).name for name in ("a", "b", "a", "a", "b")]
    assert added == ["a@1", "b@1", "a@2", "a@3", "b@2"]
    assert names(catalog.versions("a")) == ["a@1", "a@2", "a@3"]
    assert catalog.versions("c") == []


@pytest.mark.parametrize(("at_least", "expected"), [(1, 3), (3, 3), (4, 4), (9, 9)])
def test_a_number_is_the_next_one_and_not_below_the_lowest_that_is_asked_for(
    catalog: Catalog, at_least: int, expected: int
) -> None:
    catalog.add(record())
    catalog.add(record())
    assert catalog.add(record(), at_least).version == expected
    assert catalog.add(record()).version == expected + 1
    assert catalog.add(record("new"), at_least).version == at_least


def test_what_is_not_there_is_none(catalog: Catalog) -> None:
    catalog.add(record())
    assert catalog.find("sql", 2) is None
    assert catalog.find("sq", 1) is None
    assert catalog.newest("sq") is None


def test_the_newest_is_the_highest_ready_number(catalog: Catalog) -> None:
    for _ in range(11):
        catalog.add(record())
    catalog.change("sql", 11, state=VersionState.DELETING)
    newest = catalog.newest("sql")
    assert newest is not None
    assert newest.version == 10
    assert page(catalog) == ["sql@10"]
    assert names(catalog.in_state(VersionState.DELETING)) == ["sql@11"]


def test_a_number_is_never_given_twice(catalog: Catalog) -> None:
    for _ in range(3):
        catalog.add(record())
    catalog.remove("sql", [2, 3])
    assert names(catalog.versions("sql")) == ["sql@1"]
    assert catalog.add(record()).version == 4
    catalog.remove("sql", [1, 4])
    assert catalog.versions("sql") == []
    assert catalog.add(record()).version == 5


def test_an_id_is_known_when_its_versions_are_gone(catalog: Catalog) -> None:
    catalog.add(record("gone"))
    catalog.add(record("here"))
    catalog.remove("gone", [1])
    assert (catalog.knows("gone"), catalog.knows("here"), catalog.knows("never")) == (
        True,
        True,
        False,
    )
    assert catalog.known() == {"gone", "here"}
    assert catalog.ready() == {"here"}


def test_removing_leaves_other_ids_and_versions(catalog: Catalog) -> None:
    for name in ("a", "b", "a"):
        catalog.add(record(name))
    catalog.remove("a", [1, 7])
    catalog.remove("b", [])
    assert names(catalog.versions("a") + catalog.versions("b")) == ["a@2", "b@1"]


def test_a_page_has_the_newest_of_each_id_in_the_order_of_code_points(catalog: Catalog) -> None:
    ids = ["b", "A", "a-1", "Z", "a_1", "a", "a.1", "B", "a1", "0"]
    for name in ids:
        catalog.add(record(name))
    catalog.add(record("a"))
    everything = [f"{name}@{2 if name == 'a' else 1}" for name in sorted(ids)]
    assert page(catalog) == everything
    found: list[str] = []
    while more := page(catalog, after=found[-1].partition("@")[0] if found else "", limit=3):
        found += more
    assert found == everything


@pytest.mark.parametrize("kind", [None, "Sparse"])
def test_a_page_is_cut_at_its_limit_after_it_is_filtered(
    catalog: Catalog, kind: str | None
) -> None:
    for number in range(6):
        kinds = ("Sparse",) if number % 2 else ("LowRank",)
        catalog.add(record(f"a{number}", kinds=kinds))
    expected = ["a1@1", "a3@1"] if kind else ["a0@1", "a1@1"]
    assert page(catalog, kind=kind, limit=2) == expected


def test_a_page_by_kind_has_those_that_have_it_among_others(catalog: Catalog) -> None:
    catalog.add(record("a", kinds=("LowRank",)))
    catalog.add(record("b", kinds=("LowRank", "Sparse")))
    catalog.add(record("c", kinds=("Sparse",)))
    assert page(catalog, kind="Sparse") == ["b@1", "c@1"]
    assert page(catalog, kind="Low") == []


def test_a_page_by_labels_has_those_that_have_all_of_them(catalog: Catalog) -> None:
    catalog.add(record("a", labels={"team": "x", "env": "prod"}))
    catalog.add(record("b", labels={"team": "x"}))
    catalog.add(record("c", labels={"team": "X", "env": "prod"}))
    catalog.add(record("d"))
    assert page(catalog, labels={"team": "x"}) == ["a@1", "b@1"]
    assert page(catalog, labels={"team": "x", "env": "prod"}) == ["a@1"]
    assert page(catalog, labels={"nothing": "x"}) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a.b", "1"),
        ("a/b-c_d", ""),
        ("0", "true"),
        ("k", "null"),
        ("k", '"quoted"'),
        ("k", "it's"),
        ("k", "50%_\\"),
        ("k", "üñ漢"),
        ("k", "{}"),
    ],
)
def test_labels_are_compared_as_text_whatever_is_in_them(
    catalog: Catalog, key: str, value: str
) -> None:
    catalog.add(record("other", labels={key: "other", "b": value}))
    catalog.add(record("one", labels={key: value}))
    assert page(catalog, labels={key: value}) == ["one@1"]


def test_labels_of_an_older_version_find_nothing(catalog: Catalog) -> None:
    catalog.add(record(labels={"team": "x"}))
    catalog.add(record(labels={"team": "y"}))
    assert page(catalog, labels={"team": "x"}) == []


def test_a_change_is_kept_and_comes_back(catalog: Catalog) -> None:
    catalog.add(record(labels={"a": "1"}))
    changed = catalog.change("sql", 1, labels={"b": "2"}, pinned=True)
    assert (changed.labels, changed.pinned) == ({"b": "2"}, True)
    assert catalog.find("sql", 1) == changed
    assert names(catalog.pinned()) == ["sql@1"]
    catalog.change("sql", 1, state=VersionState.DELETING)
    assert catalog.pinned() == []
    catalog.change("sql", 1, state=VersionState.READY, pinned=False)
    assert catalog.pinned() == []


def test_changing_what_is_gone_says_so(catalog: Catalog) -> None:
    with pytest.raises(UnknownAdapterError, match="'sql@3'"):
        catalog.change("sql", 3, pinned=True)


def test_uses_add_up(catalog: Catalog) -> None:
    for name in ("a", "b", "a"):
        catalog.add(record(name))
    catalog.count_uses([("b", 1, 2, 10.0), ("a", 1, 3, 20.5), ("gone", 1, 1, 1.0)])
    catalog.count_uses([("a", 1, 4, 30.5)])
    catalog.count_uses([])
    uses = {r.name: (r.uses, r.last_used) for n in ("a", "b") for r in catalog.versions(n)}
    assert uses == {"a@1": (7, 30.5), "a@2": (0, None), "b@1": (2, 10.0)}


def test_a_content_counts_once_however_often_it_is_there(catalog: Catalog) -> None:
    assert catalog.total_bytes() == 0
    catalog.add(record("a", "1", nbytes=100))
    catalog.add(record("b", "1", nbytes=100))
    catalog.add(record("b", "2", nbytes=1 << 40))
    catalog.add(record("sum", "1", nbytes=0, source=Source.COMPOSITION))
    assert catalog.total_bytes() == 100 + (1 << 40)
    assert catalog.digests() == {"1" * 64, "2" * 64}
    catalog.remove("a", [1])
    assert catalog.has_digest("1" * 64)
    catalog.remove("b", [1])
    catalog.remove("sum", [1])
    assert not catalog.has_digest("1" * 64)
    assert catalog.total_bytes() == 1 << 40


def test_compositions_are_found_whatever_their_state(catalog: Catalog) -> None:
    catalog.add(record("plain"))
    catalog.add(record("sum", source=Source.COMPOSITION, parts=(Part("plain", 1, 0.5),)))
    catalog.change("sum", 1, state=VersionState.DELETING)
    (found,) = catalog.compositions()
    assert found.parts == (Part("plain", 1, 0.5),)


def test_a_catalog_is_there_when_it_is_opened_again(url: str) -> None:
    first = Catalog(url)
    first.add(record())
    first.close()
    again = Catalog(url)
    assert names(again.versions("sql")) == ["sql@1"]
    assert again.add(record()).version == 2
    again.close()


def test_a_catalog_of_another_schema_is_refused_and_not_touched(url: str) -> None:
    execute(
        url,
        "CREATE TABLE polydelta_schema (number INTEGER PRIMARY KEY)",
        f"INSERT INTO polydelta_schema VALUES ({SCHEMA + 1})",
    )
    with pytest.raises(StoreError, match=rf"schema {SCHEMA + 1}.*reads {SCHEMA}\)"):
        Catalog(url)
    # They were not made: making them here does not meet them.
    execute(url, *(f"CREATE TABLE {table} (x INTEGER)" for table in TABLES[:2]))


def test_a_database_that_is_gone_is_a_store_error_for_every_question(
    url: str, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.add(record())
    execute(url, *(f"DROP TABLE {table}" for table in TABLES))
    questions: list[Callable[[], object]] = [
        lambda: catalog.add(record()),
        lambda: catalog.newest("sql"),
        lambda: catalog.find("sql", 1),
        lambda: catalog.versions("sql"),
        lambda: catalog.knows("sql"),
        catalog.known,
        catalog.ready,
        lambda: page(catalog),
        catalog.pinned,
        catalog.compositions,
        catalog.digests,
        lambda: catalog.has_digest("a" * 64),
        catalog.total_bytes,
        lambda: catalog.change("sql", 1, pinned=True),
        lambda: catalog.count_uses([("sql", 1, 1, 1.0)]),
        lambda: catalog.remove("sql", [1]),
    ]
    for ask in questions:
        caplog.clear()
        with pytest.raises(StoreError) as refused:
            ask()
        # What a driver says may name the host and the user: it is for the operator.
        assert str(refused.value) == "The catalog does not answer; see the server's log."
        assert "polydelta_" in caplog.text


def test_threads_that_add_at_the_same_time_get_numbers_without_a_gap(catalog: Catalog) -> None:
    barrier = threading.Barrier(8)

    def add(_: int) -> list[int]:
        barrier.wait()
        return [catalog.add(record()).version for _ in range(10)]

    with ThreadPoolExecutor(8) as threads:
        given = list(threads.map(add, range(8)))
    assert all(versions == sorted(versions) for versions in given)
    assert sorted(chain.from_iterable(given)) == list(range(1, 81))


def test_numbers_are_not_given_twice_while_versions_go(catalog: Catalog) -> None:
    barrier = threading.Barrier(6)

    def churn(_: int) -> list[int]:
        barrier.wait()
        given: list[int] = []
        for _ in range(10):
            given.append(catalog.add(record()).version)
            catalog.remove("sql", given)
        return given

    with ThreadPoolExecutor(6) as threads:
        given = list(chain.from_iterable(threads.map(churn, range(6))))
    assert sorted(given) == list(range(1, 61))


def test_uses_that_threads_count_in_any_order_add_up(catalog: Catalog) -> None:
    ids = [f"a{number}" for number in range(5)]
    for name in ids:
        catalog.add(record(name))
    barrier = threading.Barrier(4)

    def count(number: int) -> None:
        order = ids[number:] + ids[:number]
        barrier.wait()
        for _ in range(10):
            catalog.count_uses((name, 1, 1, 1.0) for name in order)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(count, range(4)))
    assert [r.uses for name in ids for r in catalog.versions(name)] == [40] * 5


WORKER = """
import sys
from polydelta.adapters_store.catalog import Catalog
from polydelta.adapters_store.records import AdapterFacts, AdapterRecord, Source

sys.stdin.readline()
catalog = Catalog(sys.argv[1])
facts = AdapterFacts("LORA", ("LowRank",), 1, 1, 1)
for _ in range(10):
    record = AdapterRecord("sql", 0, "a" * 64, facts, "base", 1.0, Source.UPLOAD)
    print(catalog.add(record).version)
"""


def test_processes_that_open_and_add_at_the_same_time_get_numbers_without_a_gap(url: str) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    given = [int(line) for worker in workers for line in worker.communicate(timeout=50)[0].split()]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sorted(given) == list(range(1, 41))


@pytest.mark.parametrize("attempt", range(4))
def test_threads_may_open_a_new_catalog_at_the_same_time(url: str, attempt: int) -> None:
    barrier = threading.Barrier(6)

    def open_one(_: int) -> Catalog:
        barrier.wait()
        return Catalog(url)

    with ThreadPoolExecutor(6) as threads:
        for catalog in threads.map(open_one, range(6)):
            catalog.add(record())
            catalog.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3cret",
        "nonsense://user:s3cret@host/db",
        "postgresql+nonsense://user:s3cret@host/db",
        "postgresql+psycopg://user:x/s3cret@host/db",
        "postgresql+psycopg://user:s3cret@host:port/db",
        "postgresql+psycopg://user:s3cret@127.0.0.1:1/db",
        "postgresql+psycopg://user:s3cret@127.0.0.1:1/db?nonsense=1",
        "postgresql+psycopg://user:pass@s3cret@127.0.0.1:1/db",
        "postgresql+psycopg://user:pass@127.0.0.1:1/s3cret@host/db",
        "sqlite:////nowhere/s3cret.db",
        "sqlite://?timeout=s3cret",
    ],
)
def test_a_url_that_cannot_be_used_is_a_store_error_without_the_password(url: str) -> None:
    with pytest.raises(StoreError, match="catalog") as refused:
        Catalog(url)
    assert "s3cret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_driver_says_when_it_opens_has_no_password_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("psycopg")

    def connect(**options: Any) -> None:
        raise ValueError(f"cannot do {options}")

    monkeypatch.setattr("psycopg.connect", connect)
    with pytest.raises(StoreError, match=r"cannot be opened: cannot do .*myhost") as refused:
        Catalog("postgresql+psycopg://user:s3cret%40@myhost/db?sslpassword=an0ther")
    assert "s3cret" not in str(refused.value)
    assert "an0ther" not in str(refused.value)


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 999])
def test_a_file_that_is_no_database_is_a_store_error_and_stays(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "catalog.db").write_bytes(content)
    with pytest.raises(StoreError, match="cannot be opened"):
        Catalog(f"sqlite:///{tmp_path / 'catalog.db'}")
    assert (tmp_path / "catalog.db").read_bytes() == content
