"""`/v1/adapters`: what each route does and answers, and what it refuses."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient

from polydelta.adapters_store.errors import AdapterError, StoreError
from polydelta.engine.adapter_entry import AdapterPlace, ResidencyState

# `World` of conftest.py.
Worlds = Any
Make = Callable[..., dict[str, bytes]]
Upload = Callable[..., dict[str, Any]]
Refusal = Callable[..., str]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def ids(client: TestClient, **query: Any) -> list[str]:
    answer = client.get("/v1/adapters", params=query)
    assert answer.status_code == 200, answer.text
    return [record["id"] for record in answer.json()["data"]]


def compose(client: TestClient, adapter_id: str, **weights: float) -> Any:
    parts = [{"id": name, "weight": weight} for name, weight in weights.items()]
    return client.post("/v1/adapters", json={"id": adapter_id, "compose": parts})


def test_an_upload_is_answered_with_the_full_record(client: TestClient, make_lora: Make) -> None:
    files = make_lora(rank=3)
    began = int(time.time())
    parts = [("files", item) for item in [*files.items(), ("README.md", b"# Mine")]]
    answer = client.post("/v1/adapters", data={"id": "sql", "labels": '{"team": "a"}'}, files=parts)
    assert answer.status_code == 201
    record = answer.json()
    assert began <= record.pop("created") <= time.time()
    assert len(record.pop("sha256")) == 64
    assert record == {
        "id": "sql",
        "object": "adapter",
        "version": 1,
        "name": "sql@1",
        "format": "LORA",
        "kinds": ["LowRank"],
        "rank": 3,
        "modules": 1,
        "bytes": sum(map(len, files.values())),
        "base": "tiny",
        "labels": {"team": "a"},
        "state": "ready",
        "problem": None,
        "source": "upload",
        "pinned": False,
        "uses": 0,
        "last_used": None,
        "active_requests": 0,
        "parts": [],
        "residency": {"state": "on disk", "pages": 0, "users": 0},
        "ignored": ["README.md"],
    }


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_an_archive_of_the_folder_is_the_same_adapter(
    name: str, client: TestClient, make_lora: Make, upload: Upload, packers: Mapping[str, Any]
) -> None:
    first = upload("sql", make_lora())
    folder = {f"sql/{file}": content for file, content in make_lora().items()}
    files = [("files", (name, packers[name](folder)))]
    answer = client.post("/v1/adapters", data={"id": "sql"}, files=files)
    assert answer.status_code == 200
    assert answer.json()["sha256"] == first["sha256"]


def test_an_identical_upload_changes_nothing_and_another_is_the_next_version(
    client: TestClient, make_lora: Make, upload: Upload
) -> None:
    assert upload("sql", make_lora(0))["version"] == 1
    files = [("files", item) for item in make_lora(0).items()]
    again = client.post("/v1/adapters", data={"id": "sql"}, files=files)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    assert upload("sql", make_lora(1))["version"] == 2
    versions = client.get("/v1/adapters/sql/versions").json()
    assert [record["name"] for record in versions["data"]] == ["sql@1", "sql@2"]


def test_put_takes_the_id_from_the_path(
    client: TestClient, make_lora: Make, refusal: Refusal
) -> None:
    files = [("files", item) for item in make_lora().items()]
    answer = client.put("/v1/adapters/sql", files=files)
    assert (answer.status_code, answer.json()["name"]) == (201, "sql@1")
    assert client.put("/v1/adapters/sql", data={"id": "sql"}, files=files).status_code == 200
    refusal(client.put("/v1/adapters/sql", data={"id": "other"}, files=files), 400, "id")
    refusal(client.put("/v1/adapters/sql@1", files=files), 400, "id")
    refusal(client.put("/v1/adapters/base", files=files), 400, "id")


def test_labels_are_replaced_by_put(
    client: TestClient, make_lora: Make, upload: Upload, refusal: Refusal
) -> None:
    upload("sql", make_lora(0), team="a")
    upload("sql", make_lora(1))
    answer = client.put("/v1/adapters/sql", json={"labels": {"stage": "live"}})
    assert answer.json()["labels"] == {"stage": "live"}
    client.put("/v1/adapters/sql@1", json={"labels": {}})
    versions = client.get("/v1/adapters/sql/versions").json()["data"]
    assert [record["labels"] for record in versions] == [{}, {"stage": "live"}]
    refusal(client.put("/v1/adapters/sql", json={"labels": {"": "x"}}), 400, "labels")
    refusal(client.put("/v1/adapters/sql", json={}), 400, "labels")
    refusal(client.put("/v1/adapters/none", json={"labels": {}}), 404, "id")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "id"),
        ({"id": "sum"}, 400, "compose"),
        ({"id": "sum", "compose": []}, 400, "compose"),
        ({"id": "sum", "compose": [{"id": "a"}] * 65}, 400, "compose"),
        ({"id": "sum", "compose": [{"id": "a", "wait": 1}]}, 400, "compose[0].wait"),
        ({"id": "sum", "compose": [{"id": "a", "weight": "1"}]}, 400, "compose[0].weight"),
        ({"id": "sum", "compose": [{"id": "a", "weight": 10**400}]}, 400, "compose[0].weight"),
        ({"id": "sum", "compose": [{"id": "a", "weight": 0}]}, 400, "compose"),
        ({"id": "sum", "compose": [{"id": "none"}]}, 404, "compose"),
        ({"id": "sum", "compose": [{"id": "../a"}]}, 404, "compose"),
        ({"id": "sum", "compose": [{"id": "a"}], "path": "/x"}, 400, "path"),
        ({"id": "../sum", "compose": [{"id": "a"}]}, 400, "id"),
        ({"id": "base", "compose": [{"id": "a"}]}, 400, "id"),
        ({"id": "sum", "compose": [{"id": "a"}], "labels": {"a": "\n"}}, 400, "labels"),
        ({"id": "sum", "compose": [{"id": "a"}], "labels": {"a": 1}}, 400, "labels.a"),
        ({"id": "sum", "compose": [{"id": "a"}], "colour": "red"}, 400, "colour"),
        ({"id": "sum", "path": "relative"}, 400, "path"),
        ({"id": "sum", "path": "/etc"}, 400, "path"),
        ({"id": "sum", "path": "/allowed\0"}, 400, "path"),
    ],
    ids=range(19),
)
def test_a_bad_json_body_is_refused_by_name(
    body: Any,
    status: int,
    param: str,
    client: TestClient,
    make_lora: Make,
    upload: Upload,
    refusal: Refusal,
) -> None:
    upload("a", make_lora())
    refusal(client.post("/v1/adapters", json=body), status, param)
    assert ids(client) == ["a"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"id": "\\ud800"}', 400),
        (b'{"\\ud800": 1}', 400),
        (b'{"id": 1' + b"9" * 5000, 400),
        (b" " * (1 << 20) + b"{}", 413),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("path", ["", "/a"])
def test_a_body_that_is_no_json_object_is_refused(
    content: bytes, status: int, path: str, client: TestClient, refusal: Refusal
) -> None:
    headers = {"Content-Type": "application/json"}
    method = "PUT" if path else "POST"
    answer = client.request(method, f"/v1/adapters{path}", content=content, headers=headers)
    assert len(answer.json()["error"]["message"]) < 300
    refusal(answer, status, answer.json()["error"]["param"])


def test_a_saved_composition_is_a_version_with_parts(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload
) -> None:
    upload("a", make_lora(0))
    upload("b", make_lora(1))
    world.engine.places[world.store.resolve("b")] = AdapterPlace(ResidencyState.RESIDENT, 3, 1)
    answer = compose(client, "sum", a=0.5, b=2.0)
    assert answer.status_code == 201
    record = answer.json()
    assert (record["format"], record["source"], record["rank"]) == (
        "COMPOSITION",
        "composition",
        4,
    )
    assert record["residency"] is None
    assert record["parts"] == [
        {
            "id": "a",
            "version": 1,
            "weight": 0.5,
            "residency": {"state": "on disk", "pages": 0, "users": 0},
        },
        {
            "id": "b",
            "version": 1,
            "weight": 2.0,
            "residency": {"state": "resident", "pages": 3, "users": 1},
        },
    ]
    assert compose(client, "sum", a=0.5, b=2.0).status_code == 200
    assert compose(client, "sum", a=0.5).json()["version"] == 2


def test_labels_of_a_composition_are_replaced_and_else_kept(
    client: TestClient, make_lora: Make, upload: Upload
) -> None:
    upload("a", make_lora())
    body = {"compose": [{"id": "a", "weight": 2}]}
    first = client.put("/v1/adapters/sum", json=body | {"labels": {"x": "1"}})
    assert (first.status_code, first.json()["labels"]) == (201, {"x": "1"})
    second = client.put("/v1/adapters/sum", json=body | {"labels": {"x": "2"}})
    assert (second.status_code, second.json()["labels"]) == (200, {"x": "2"})
    third = client.put("/v1/adapters/sum", json=body)
    assert (third.status_code, third.json()["labels"]) == (200, {"x": "2"})


def test_a_folder_below_an_allowed_root_is_taken_over(
    client: TestClient, world: Worlds, make_lora: Make, refusal: Refusal
) -> None:
    folder = world.named_adapter("job-7", {**make_lora(), "notes.txt": b"x"})
    answer = client.post(
        "/v1/adapters", json={"id": "sql", "path": str(folder), "labels": {"a": "b"}}
    )
    assert answer.status_code == 201
    assert (answer.json()["source"], answer.json()["ignored"]) == ("path", ["notes.txt"])
    shutil.rmtree(folder)
    assert "cannot be read" in refusal(
        client.post("/v1/adapters", json={"id": "sql", "path": str(folder)}), 400, "path"
    )
    assert client.get("/v1/adapters/sql").json()["labels"] == {"a": "b"}


def test_the_list_has_the_newest_of_uploads_and_folders_by_id(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload
) -> None:
    upload("b", make_lora(0))
    upload("b", make_lora(1))
    world.folder_adapter("a", make_lora(2))
    world.folder_adapter("c", {CONFIG: b"{"})
    answer = client.get("/v1/adapters").json()
    assert (answer["object"], answer["has_more"], answer["last_id"]) == ("list", False, "c")
    assert [(r["name"], r["source"], r["state"]) for r in answer["data"]] == [
        ("a@1", "folder", "ready"),
        ("b@2", "upload", "ready"),
        ("c@1", "folder", "invalid"),
    ]
    assert "JSON" in answer["data"][2]["problem"]


def test_the_list_comes_in_pages(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload
) -> None:
    for number in range(5):
        name, files = f"x{number}", make_lora(number)
        _ = upload(name, files) if number % 2 else world.folder_adapter(name, files)
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    for expected in (True, True, False):
        answer = client.get("/v1/adapters", params=query).json()
        assert answer["has_more"] == expected
        seen += [record["id"] for record in answer["data"]]
        query["after"] = answer["last_id"]
    assert seen == ["x0", "x1", "x2", "x3", "x4"]
    answer = client.get("/v1/adapters", params=query).json()
    assert (answer["data"], answer["last_id"]) == ([], None)


def test_the_list_is_filtered_by_labels_and_kind(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload
) -> None:
    upload("a", make_lora(0), team="x", stage="live")
    upload("b", make_lora(1), team="x")
    world.folder_adapter("c", make_lora(2))
    assert ids(client, label="team:x") == ["a", "b"]
    assert ids(client, label=["team:x", "stage:live"]) == ["a"]
    assert ids(client, label="team:y") == []
    assert ids(client, kind="LowRank") == ["a", "b", "c"]
    assert ids(client, kind="Sparse") == []
    unknown = client.get("/v1/adapters", params={"kind": "SHIRA"})
    assert unknown.status_code == 400
    assert "LowRank, Sparse" in unknown.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("after=..", "after"),
        ("after=%00", "after"),
        ("label=team", "label"),
        ("label=:x", "label"),
        ("label=a:%00", "label"),
        ("label=a:x&label=a:y", "label"),
        ("page=2", "page"),
    ],
)
def test_a_bad_query_is_refused_by_name(
    query: str, param: str, client: TestClient, refusal: Refusal
) -> None:
    refusal(client.get(f"/v1/adapters?{query}"), 400, param)


def test_uses_and_users_are_current(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload
) -> None:
    upload("a", make_lora())
    world.folder_adapter("f", make_lora(1))
    with world.store.lease([("a", 1.0)]), world.store.lease([("f", 1.0)]):
        record = client.get("/v1/adapters/a").json()
        assert (record["uses"], record["active_requests"]) == (1, 1)
        assert time.time() - record["last_used"] < 60
        assert client.get("/v1/adapters/f").json()["active_requests"] == 1
    assert client.get("/v1/adapters/a@1").json()["active_requests"] == 0


def test_a_catalog_that_cannot_be_written_is_read_all_the_same(
    client: TestClient,
    world: Worlds,
    make_lora: Make,
    upload: Upload,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(uses: Any) -> None:
        raise StoreError("The disk is full.")

    upload("sql", make_lora())
    world.store.lease([("sql", 1.0)]).release()
    with monkeypatch.context() as full:
        full.setattr(world.store.catalog, "count_uses", fail)
        for path in ("/v1/adapters", "/v1/adapters/sql", "/v1/adapters/sql/versions"):
            assert client.get(path).status_code == 200
    assert client.get("/v1/adapters/sql").json()["uses"] == 1


@pytest.mark.parametrize("path", ["none", "a@2", "a@0", "a@x", "..", "base", "%00", "a%2Fb"])
@pytest.mark.parametrize(
    ("method", "end"),
    [
        ("GET", ""),
        ("GET", "/versions"),
        ("DELETE", ""),
        *(("POST", f"/{order}") for order in ("load", "evict", "pin", "unpin")),
    ],
)
def test_an_unknown_adapter_is_404(
    path: str, method: str, end: str, client: TestClient, make_lora: Make, upload: Upload
) -> None:
    upload("a", make_lora())
    answer = client.request(method, f"/v1/adapters/{path}{end}")
    # For some of these no route is there at all, and a version has no versions.
    assert answer.status_code == 404 or (end == "/versions" and answer.status_code == 400)
    assert answer.json()["error"]["code"] == answer.status_code


def test_a_rollback_is_a_new_version_with_the_old_content(
    client: TestClient, make_lora: Make, upload: Upload, refusal: Refusal
) -> None:
    first = upload("a", make_lora(0), team="x")
    upload("a", make_lora(1))
    answer = client.post("/v1/adapters/a/rollback", json={"version": 1})
    assert answer.status_code == 201
    record = answer.json()
    assert (record["version"], record["source"], record["sha256"]) == (
        3,
        "rollback",
        first["sha256"],
    )
    again = client.post("/v1/adapters/a/rollback", json={"version": 1})
    assert (again.status_code, again.json()["version"]) == (200, 3)
    refusal(client.post("/v1/adapters/a/rollback", json={"version": 9}), 404, "id")
    refusal(client.post("/v1/adapters/a@1/rollback", json={"version": 1}), 400, "id")
    for wrong in (0, "1", 1.5, None, 1_000_000_000, 2**63):
        refusal(client.post("/v1/adapters/a/rollback", json={"version": wrong}), 400, "version")


def test_one_version_or_all_are_deleted(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload
) -> None:
    for seed in range(3):
        upload("a", make_lora(seed))
    answer = client.delete("/v1/adapters/a@2")
    assert answer.status_code == 200
    assert [(r["name"], r["state"]) for r in answer.json()["data"]] == [("a@2", "deleted")]
    answer = client.delete("/v1/adapters/a")
    assert [r["name"] for r in answer.json()["data"]] == ["a@1", "a@3"]
    assert ids(client) == []
    assert list((world.root / "store/content").iterdir()) == []


def test_what_is_in_use_is_not_deleted_or_later_by_choice(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload, refusal: Refusal
) -> None:
    upload("a", make_lora(0))
    with world.store.lease([("a", 1.0)]):
        assert "in use" in refusal(client.delete("/v1/adapters/a"), 409, "id")
        answer = client.delete("/v1/adapters/a?in_use=defer")
        assert [r["state"] for r in answer.json()["data"]] == ["deleting"]
        assert client.get("/v1/adapters/a@1").json()["state"] == "deleting"
        refusal(client.get("/v1/adapters/a"), 404, "id")
        refusal(client.post("/v1/adapters/a@1/load"), 409, "id")
    deadline = time.monotonic() + 20
    while client.get("/v1/adapters/a@1").status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    refusal(client.delete("/v1/adapters/a?in_use=never"), 400, "in_use")
    refusal(client.delete("/v1/adapters/a?in-use=defer"), 400, "in-use")


def test_a_part_of_a_composition_is_not_deleted(
    client: TestClient, make_lora: Make, upload: Upload, refusal: Refusal
) -> None:
    upload("a", make_lora())
    compose(client, "sum", a=2.0)
    assert "'sum@1'" in refusal(client.delete("/v1/adapters/a"), 409, "id")
    assert client.delete("/v1/adapters/sum").status_code == 200
    assert client.delete("/v1/adapters/a").status_code == 200


def test_an_adapter_in_a_folder_is_only_read(
    client: TestClient, world: Worlds, make_lora: Make, refusal: Refusal
) -> None:
    folder = world.folder_adapter("f", make_lora())
    for method, end, body in (
        ("DELETE", "", None),
        ("PUT", "", {"labels": {}}),
        ("POST", "/pin", None),
        ("POST", "/unpin", None),
        ("POST", "/rollback", {"version": 1}),
    ):
        answer = client.request(method, f"/v1/adapters/f{end}", json=body)
        assert "upload" in refusal(answer, 409, "id")
    assert client.post("/v1/adapters/f/load").json()["residency"]["state"] == "resident"
    assert world.engine.read == [folder]
    assert client.post("/v1/adapters/f@1/evict").json()["residency"]["state"] == "on disk"
    assert client.get("/v1/adapters/f/versions").json()["data"][0]["name"] == "f@1"


def test_an_adapter_in_a_folder_is_adopted_by_an_upload(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload
) -> None:
    world.folder_adapter("f", make_lora(0))
    assert upload("f", make_lora(1))["version"] == 2
    versions = client.get("/v1/adapters/f/versions").json()["data"]
    assert [(r["name"], r["source"]) for r in versions] == [("f@1", "adopted"), ("f@2", "upload")]
    assert ids(client) == ["f"]


def test_load_pin_unpin_and_evict_are_done_by_the_engine(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload, refusal: Refusal
) -> None:
    upload("a", make_lora())
    loaded = client.post("/v1/adapters/a/load").json()
    assert loaded["residency"] == {"state": "resident", "pages": 3, "users": 0}
    assert not loaded["pinned"]
    assert client.post("/v1/adapters/a@1/pin").json()["pinned"]
    assert [record.name for record in world.store.catalog.pinned()] == ["a@1"]
    assert "pinned" in refusal(client.post("/v1/adapters/a/evict"), 409, "id")
    world.engine.error = None
    assert not client.post("/v1/adapters/a/unpin").json()["pinned"]
    assert world.engine.pinned == set()
    assert client.post("/v1/adapters/a/evict").json()["residency"]["state"] == "on disk"


def test_a_pin_that_fails_is_not_kept(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload, refusal: Refusal
) -> None:
    upload("a", make_lora())
    world.engine.error = AdapterError("'a@1' needs 900 pages")
    assert "900 pages" in refusal(client.post("/v1/adapters/a/pin"), 400, "id")
    assert world.store.catalog.pinned() == []


def test_all_parts_of_a_composition_are_loaded_and_other_orders_go_to_its_parts(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload, refusal: Refusal
) -> None:
    upload("a", make_lora(0))
    upload("b", make_lora(1))
    compose(client, "sum", a=1.0, b=1.0)
    parts = client.post("/v1/adapters/sum/load").json()["parts"]
    assert [part["residency"]["state"] for part in parts] == ["resident", "resident"]
    for order in ("evict", "pin", "unpin"):
        message = refusal(client.post(f"/v1/adapters/sum/{order}"), 409, "id")
        assert f"{order} its parts ('a@1', 'b@1')" in message


def test_an_engine_that_has_stopped_is_503(
    client: TestClient, world: Worlds, make_lora: Make, upload: Upload, refusal: Refusal
) -> None:
    upload("a", make_lora())
    world.engine.alive = False
    for order in ("load", "evict", "pin", "unpin"):
        refusal(client.post(f"/v1/adapters/a/{order}"), 503)
    assert client.get("/v1/adapters/a").status_code == 200


def test_a_client_that_leaves_does_not_wait_for_the_pool(
    world: Worlds, make_lora: Make, upload: Upload, send: Callable[..., Any]
) -> None:
    upload("a", make_lora())
    world.engine.stuck = True
    answer = send(world.app, [], path="/v1/adapters/a/load", leave=True)
    assert answer.status_code == 499


def test_the_description_of_the_api_has_both_bodies(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for operation in (paths["/v1/adapters"]["post"], paths["/v1/adapters/{name}"]["put"]):
        content = operation["requestBody"]["content"]
        assert set(content) == {"multipart/form-data", "application/json"}
        assert "$defs" not in json.dumps(content)
