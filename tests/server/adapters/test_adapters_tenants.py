"""What tenants may do with adapters, and that what they may not see is as good as not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from polydelta.adapters_store.errors import InUseError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.request import ErrorKind
from polydelta.server.app import create_app
from polydelta.server.settings import ServerSettings
from polydelta.server.stores import disk_tier, make_publisher

# `World` and `FakeEngine` of the conftest.py files.
Worlds = Any
Engines = Any
Make = Callable[..., dict[str, bytes]]
Refusal = Callable[..., str]

TENANTS = {
    "acme": {"adapters": ["shared-*"], "uploads": ["acme-*"], "upload_quota": "8KiB"},
    "other": {"adapters": ["shared-*"], "uploads": ["other-*"]},
    "reader": {"adapters": ["*"]},
}
# There is no adapter of these: the first is not acme's to see, the second would be its own.
NOWHERE, MISSING = "other-nowhere", "acme-nowhere"
FILES = "@files"


@dataclass
class Site:
    """A whole server, with adapters of two tenants and of the operator."""

    app: FastAPI
    client: TestClient
    make_lora: Make
    engine: Engines

    def ask(self, who: str, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """body: JSON, or FILES for the form of an adapter."""
        if body == FILES:
            seed = options.pop("seed", 99)
            files = [("files", each) for each in self.make_lora(seed).items()]
            options |= {"files": files}
        elif body is not None:
            options |= {"json": body}
        headers = {"Authorization": f"Bearer sk-{who}"}
        return self.client.request(method, path, headers=headers, **options)

    def done(self, who: str, method: str, path: str, body: Any = None, **options: Any) -> Any:
        answer = self.ask(who, method, path, body, **options)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()


@pytest.fixture
def site(world: Worlds, engine: Engines, make_lora: Make) -> Iterator[Site]:
    for name in ("adapter_place", "load_adapter", "unpin_adapter", "evict_adapter", "withdraw"):
        setattr(engine, name, getattr(world.engine, name))
    engine.layout = world.engine.layout
    tables = {name: {"keys": [f"sk-{name}"], **table} for name, table in TENANTS.items()}
    settings = ServerSettings(adapters=(), api_key=("sk-root",), tenants=json.dumps(tables))
    publisher = make_publisher(world.store, engine, settings, disk_tier(world.store, settings))
    app = create_app(engine, world.store, publisher, settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        site = Site(app, client, make_lora, world.engine)
        for seed, name in enumerate(("other-secret", "other-secret", "shared-a", "acme-own")):
            site.done("root", "PUT", f"/v1/adapters/{name}", FILES, seed=seed)
        for seed, name in enumerate(("other-folder", "shared-folder")):
            world.folder_adapter(name, make_lora(50 + seed))
        parts = [{"id": "shared-a"}, {"id": "other-secret", "weight": 0.5}]
        site.done("root", "PUT", "/v1/adapters/shared-sum", {"compose": parts})
        yield site


@dataclass(frozen=True)
class Asked:
    """A request about an adapter; `@` stands for its name."""

    path: str
    body: Any = None
    params: dict[str, str] = field(default_factory=dict)
    # What a tenant is answered that may not see it; 403 comes before the question what is there.
    status: int = 404
    # Whether the name may have a version.
    version: bool = True


def model(**fields: Any) -> Any:
    return {"model": "fake-base", "max_tokens": 2} | fields


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
COMPOSE = {"compose": [{"id": "shared-a"}, {"id": "@"}]}
PLACE = "/v1/adapters/@"
# Every route of the server: what is asked of it about an adapter, if it takes the name of one.
ROUTES: dict[tuple[str, str], Sequence[Asked]] = {
    ("GET", "/openapi.json"): (),
    ("GET", "/docs"): (),
    ("GET", "/docs/oauth2-redirect"): (),
    ("GET", "/redoc"): (),
    ("GET", "/health"): (),
    ("GET", "/ping"): (),
    ("GET", "/ready"): (),
    ("GET", "/version"): (),
    ("GET", "/metrics"): (),
    ("GET", "/v1/models"): (),
    ("GET", "/v1/models/{name:path}"): [Asked("/v1/models/@")],
    ("POST", "/v1/completions"): [
        Asked("/v1/completions", model(prompt="Hi", model="@")),
        Asked("/v1/completions", model(prompt="Hi", model="@", stream=True)),
        Asked("/v1/completions", model(prompt="Hi", adapters=[{"id": "@"}])),
        Asked("/v1/completions", model(prompt="Hi", adapters=[{"id": "shared-a"}, {"id": "@"}])),
        Asked("/v1/completions", model(prompt="Hi", model="@", adapters=["shared-a"]), status=400),
    ],
    ("POST", "/v1/chat/completions"): [
        Asked("/v1/chat/completions", model(model="@", **CHAT)),
        Asked("/v1/chat/completions", model(adapters=[{"id": "@", "weight": 0.5}], **CHAT)),
    ],
    ("POST", "/v1/adapters"): [
        Asked("/v1/adapters", {"id": "acme-sum"} | COMPOSE),
        Asked(
            "/v1/adapters", {"id": "@", "compose": [{"id": "shared-a"}]}, status=403, version=False
        ),
        Asked("/v1/adapters", {"id": "@", "path": "/x"}, status=403),
    ],
    ("PUT", "/v1/adapters/{name}"): [
        Asked("/v1/adapters/acme-sum", COMPOSE),
        Asked(PLACE, {"labels": {"a": "b"}}),
        Asked(PLACE, COMPOSE, status=403, version=False),
        Asked(PLACE, {"path": "/x"}, status=403),
        Asked(PLACE, FILES, status=403, version=False),
    ],
    ("GET", "/v1/adapters"): [
        Asked("/v1/adapters", params={"after": "@"}, status=200, version=False)
    ],
    ("GET", "/v1/adapters/{name}"): [Asked(PLACE)],
    ("GET", "/v1/adapters/{adapter_id}/versions"): [Asked(f"{PLACE}/versions", version=False)],
    ("DELETE", "/v1/adapters/{name}"): [Asked(PLACE), Asked(PLACE, params={"in_use": "defer"})],
    ("POST", "/v1/adapters/{adapter_id}/rollback"): [
        Asked(f"{PLACE}/rollback", {"version": 1}, version=False)
    ],
    ("POST", "/v1/adapters/{name}/load"): [Asked(f"{PLACE}/load")],
    ("POST", "/v1/adapters/{name}/evict"): [Asked(f"{PLACE}/evict", status=403)],
    ("POST", "/v1/adapters/{name}/pin"): [Asked(f"{PLACE}/pin", status=403)],
    ("POST", "/v1/adapters/{name}/unpin"): [Asked(f"{PLACE}/unpin", status=403)],
    ("POST", "/v1/load_lora_adapter"): [
        Asked("/v1/load_lora_adapter", {"lora_name": "@", "lora_path": "/x"}, status=403)
    ],
    ("POST", "/v1/unload_lora_adapter"): [Asked("/v1/unload_lora_adapter", {"lora_name": "@"})],
}
QUESTIONS = [
    pytest.param(method, asked, id=f"{method} {asked.path}")
    for (method, _), each in ROUTES.items()
    for asked in each
]


def named(asked: Any, name: str) -> Any:
    """With a name in place of `@`."""
    if isinstance(asked, str):
        return asked if asked == FILES else asked.replace("@", name)
    if isinstance(asked, dict):
        return {key: named(value, name) for key, value in asked.items()}
    return [named(each, name) for each in asked] if isinstance(asked, list) else asked


def put(site: Site, method: str, asked: Asked, name: str) -> tuple[int, str]:
    """Status, and the body with `@` for the name."""
    path, body, params = (named(each, name) for each in (asked.path, asked.body, asked.params))
    answer = site.ask("acme", method, path, body, params=params)
    return answer.status_code, answer.text.replace(name, "@")


def routes_of(router: Any) -> Iterator[tuple[str, str]]:
    for route in router.routes:
        # Newer versions of FastAPI keep routers that were included as they are.
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from routes_of(included)
        else:
            yield from ((method, route.path) for method in route.methods - {"HEAD"})


def test_every_route_is_asked_about_here(site: Site) -> None:
    """A new one must be written down above, so that it cannot forget who asks."""
    assert set(routes_of(site.app)) == set(ROUTES)


@pytest.mark.parametrize(("method", "asked"), QUESTIONS)
def test_a_hidden_adapter_is_answered_like_none(site: Site, method: str, asked: Asked) -> None:
    missing = put(site, method, asked, NOWHERE)
    assert missing[0] == asked.status, missing
    for hidden in ("other-secret", "other-folder"):
        assert put(site, method, asked, hidden) == missing
    if asked.version:
        # Of the hidden one there is the first and no third.
        third = put(site, method, asked, f"{NOWHERE}@3")
        assert third[0] == asked.status
        for name in ("other-secret@3", "other-secret@1", "other-folder@1"):
            answer = put(site, method, asked, name)
            assert (answer[0], answer[1].replace("@1", "@3")) == third
    if asked.status == 404:
        assert put(site, method, asked, MISSING) == missing


@pytest.mark.parametrize(
    ("method", "asked"), [each for each in QUESTIONS if each.values[1].status == 404]
)
def test_a_hidden_adapter_takes_the_work_of_none(
    site: Site, world: Worlds, monkeypatch: pytest.MonkeyPatch, method: str, asked: Asked
) -> None:
    """The catalog and the folders are asked as often, and nothing about the hidden one."""
    questions: list[tuple[str, tuple[object, ...]]] = []

    def watch(owner: Any, name: str) -> None:
        ask = getattr(owner, name)

        def told(*args: object, **options: object) -> object:
            questions.append((name, args))
            return ask(*args, **options)

        monkeypatch.setattr(owner, name, told)

    for name in ("newest", "find", "versions", "knows", "compositions", "change", "page"):
        watch(world.store.catalog, name)
    monkeypatch.setattr(world.store, "folders", FolderCatalog([world.root / "folders"]))
    watch(world.store.folders, "find")
    put(site, method, asked, MISSING)
    work_for_none = [name for name, _ in questions]
    assert work_for_none
    for hidden in ("other-secret", "other-folder"):
        questions.clear()
        put(site, method, asked, hidden)
        assert [name for name, _ in questions] == work_for_none
        assert hidden not in str(questions)


def ids(answer: Any) -> list[str]:
    return [each["id"] for each in answer["data"]]


SEEN = ["acme-own", "shared-a", "shared-folder", "shared-sum"]
ALL = ["acme-own", "other-folder", "other-secret", "shared-a", "shared-folder", "shared-sum"]


def test_lists_hold_what_is_visible(site: Site) -> None:
    for who, expected in (("acme", SEEN), ("root", ALL), ("reader", ALL)):
        assert ids(site.done(who, "GET", "/v1/adapters")) == expected
        assert ids(site.done(who, "GET", "/v1/models")) == ["fake-base", *expected]


def test_pages_are_full_and_end_where_the_visible_ends(site: Site) -> None:
    first = site.done("acme", "GET", "/v1/adapters", params={"limit": 1})
    assert (ids(first), first["has_more"], first["last_id"]) == (["acme-own"], True, "acme-own")
    # `other-...` comes after it.
    options = {"limit": 2, "after": "acme-own"}
    second = site.done("acme", "GET", "/v1/adapters", params=options)
    assert (ids(second), second["has_more"]) == (["shared-a", "shared-folder"], True)
    third = site.done("acme", "GET", "/v1/adapters", params=options | {"after": "shared-folder"})
    assert (ids(third), third["has_more"]) == (["shared-sum"], False)
    # What follows is visible to nobody but others.
    last = site.done("other", "GET", "/v1/adapters", params={"limit": 2, "after": "shared-folder"})
    assert (ids(last), last["has_more"]) == (["shared-sum"], False)


def test_filters_look_at_the_visible_only(site: Site) -> None:
    for name in ("other-secret", "shared-a"):
        site.done("root", "PUT", f"/v1/adapters/{name}", {"labels": {"team": "search"}})
    for options, expected in (
        ({"label": "team:search"}, ["shared-a"]),
        ({"kind": "LowRank"}, SEEN),
        ({"kind": "LowRank", "limit": 1}, ["acme-own"]),
    ):
        assert ids(site.done("acme", "GET", "/v1/adapters", params=options)) == expected


def test_a_tenant_works_with_what_is_its_own(site: Site) -> None:
    for seed in (7, 8):
        site.done("acme", "PUT", "/v1/adapters/acme-new", FILES, seed=seed)
    site.done("acme", "PUT", "/v1/adapters/acme-new", {"labels": {"a": "b"}})
    assert site.done("acme", "POST", "/v1/adapters/acme-new/rollback", {"version": 1})
    versions = site.done("acme", "GET", "/v1/adapters/acme-new/versions")["data"]
    assert [each["version"] for each in versions] == [1, 2, 3]
    site.done("acme", "POST", "/v1/adapters/acme-new/load")
    site.done("acme", "POST", "/v1/completions", model(model="acme-new", prompt="Hi"))
    parts = [{"id": "acme-new"}, {"id": "shared-a", "weight": 2.0}]
    site.done("acme", "POST", "/v1/adapters", {"id": "acme-sum", "compose": parts})
    for name in ("acme-sum", "acme-new@2", "acme-new"):
        site.done("acme", "DELETE", f"/v1/adapters/{name}")
    unloaded = site.ask("acme", "POST", "/v1/unload_lora_adapter", {"lora_name": "acme-own"})
    assert unloaded.status_code == 200


def test_what_is_visible_can_be_used_by_its_name(site: Site) -> None:
    for name in ("shared-a", "shared-a@1", "shared-folder", "shared-sum", "acme-own"):
        site.done("acme", "POST", "/v1/completions", model(model=name, prompt="Hi"))
        site.done("acme", "GET", f"/v1/models/{name}")
        site.done("acme", "GET", f"/v1/adapters/{name}")
        site.done("acme", "POST", f"/v1/adapters/{name}/load")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/v1/adapters/@", None),
        ("PUT", "/v1/adapters/@", {"labels": {}}),
        ("POST", "/v1/adapters/@/rollback", {"version": 1}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "@"}),
    ],
)
def test_what_is_only_visible_is_not_changed(
    site: Site, refusal: Refusal, method: str, path: str, body: Any
) -> None:
    for who, name in (("acme", "shared-a"), ("acme", "shared-none"), ("reader", "other-secret")):
        answer = site.ask(who, method, named(path, name), named(body, name))
        assert name in refusal(answer, 403, "id")
        assert answer.json()["error"]["type"] == "PermissionDeniedError"
    assert ids(site.done("root", "GET", "/v1/adapters")) == ALL


def test_nothing_is_published_outside_of_uploads(site: Site, refusal: Refusal) -> None:
    compose = {"compose": [{"id": "shared-a"}]}
    for name in ("shared-a", "shared-new", "other-secret", "anything"):
        for body in (FILES, compose):
            answer = site.ask("acme", "PUT", f"/v1/adapters/{name}", body)
            assert name in refusal(answer, 403, "id")
            options = {"data": {"id": name}} if body == FILES else {}
            sent = body if body == FILES else {"id": name} | compose
            assert name in refusal(
                site.ask("acme", "POST", "/v1/adapters", sent, **options), 403, "id"
            )
    # Whoever may publish nothing is told before the files have come.
    refusal(site.ask("reader", "POST", "/v1/adapters", FILES, data={"id": "x"}), 403)
    assert ids(site.done("root", "GET", "/v1/adapters")) == ALL


def test_paths_and_the_pool_are_for_operators(site: Site, world: Worlds, refusal: Refusal) -> None:
    path = str(world.named_adapter("job", site.make_lora(5)))
    for who in ("acme", "reader"):
        for order in ("pin", "unpin", "evict"):
            refusal(site.ask(who, "POST", f"/v1/adapters/acme-own/{order}"), 403)
        refusal(site.ask(who, "PUT", "/v1/adapters/acme-own", {"path": path}), 403, "path")
        loaded = {"lora_name": "acme-own", "lora_path": path, "load_inplace": True}
        refusal(site.ask(who, "POST", "/v1/load_lora_adapter", loaded), 403)
    for order in ("pin", "unpin", "evict"):
        site.done("root", "POST", f"/v1/adapters/other-secret/{order}")


def test_a_visible_composition_has_its_visible_parts(site: Site) -> None:
    def parts(who: str) -> list[str]:
        return [each["id"] for each in site.done(who, "GET", "/v1/adapters/shared-sum")["parts"]]

    assert parts("acme") == ["shared-a"]
    assert parts("other") == parts("root") == ["other-secret", "shared-a"]
    for path in ("/v1/adapters", "/v1/adapters/shared-sum/versions", "/v1/models"):
        assert "secret" not in site.ask("acme", "GET", path).text
    assert "secret" not in site.ask("acme", "POST", "/v1/adapters/shared-sum/load").text


def test_a_failed_load_does_not_name_hidden_parts(site: Site, refusal: Refusal) -> None:
    site.engine.error = InUseError("'other-secret@2' needs 9 pages of the pool, which has 5.")
    load = "/v1/adapters/shared-sum/load"
    message = refusal(site.ask("acme", "POST", load), 409, "id")
    assert "secret" not in message
    assert "shared-sum@1" in message
    assert "secret" in refusal(site.ask("other", "POST", load), 409, "id")


def test_a_weight_too_large_does_not_name_hidden_parts(site: Site, refusal: Refusal) -> None:
    huge = [{"id": "shared-sum", "weight": 1e308}] * 4
    answer = site.ask("acme", "POST", "/v1/completions", model(prompt="Hi", adapters=huge))
    assert "secret" not in refusal(answer, 400, "adapters")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [ErrorKind.REQUEST, ErrorKind.SERVER])
def test_a_failed_request_does_not_name_hidden_parts(
    site: Site, engine: Engines, kind: ErrorKind, stream: bool
) -> None:
    engine.error, engine.error_kind = "The files of 'other-secret@2' have changed.", kind
    status = 400 if kind is ErrorKind.REQUEST else 503
    hidden = model(prompt="Hi", model="shared-sum", stream=stream)
    chat = model(adapters=[{"id": "shared-sum", "weight": 2.0}], stream=stream, **CHAT)
    for path, body in (("/v1/completions", hidden), ("/v1/chat/completions", chat)):
        answer = site.ask("acme", "POST", path, body)
        assert answer.status_code == status
        assert "secret" not in answer.text
        assert "shared-sum@1' cannot be served: one of its parts cannot." in answer.text
        assert "'other-secret@2' have changed" in site.ask("other", "POST", path, body).text


# What tenants may name, the lease, the sum's own record, and the row that is written.
@pytest.mark.parametrize("looks", range(4))
def test_a_part_that_is_deleted_meanwhile_is_not_named(
    site: Site, world: Worlds, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    find = world.store.catalog.find
    left = looks

    def gone(adapter_id: str, version: int) -> Any:
        nonlocal left
        left -= adapter_id == "other-secret"
        return None if left < 0 and adapter_id == "other-secret" else find(adapter_id, version)

    monkeypatch.setattr(world.store.catalog, "find", gone)
    compose = {"compose": [{"id": "shared-sum"}, {"id": "acme-own"}]}
    answer = site.ask("acme", "PUT", "/v1/adapters/acme-sum", compose)
    assert "secret" not in refusal(answer, 404, "compose")


def test_what_others_have_composed_of_an_adapter_is_not_named(site: Site, refusal: Refusal) -> None:
    site.done("root", "PUT", "/v1/adapters/other-sum", {"compose": [{"id": "acme-own"}]})
    message = refusal(site.ask("acme", "DELETE", "/v1/adapters/acme-own"), 409, "id")
    assert "somebody else's composition" in message
    assert "other-sum" not in message
    refused = refusal(site.ask("root", "DELETE", "/v1/adapters/acme-own"), 409, "id")
    assert "'other-sum@1'" in refused
    site.done("acme", "PUT", "/v1/adapters/acme-mine", {"compose": [{"id": "shared-a"}]})
    mine = site.ask("root", "DELETE", "/v1/adapters/shared-a")
    assert "'acme-mine@1'" in refusal(mine, 409, "id") or "'shared-sum@1'" in mine.text


def test_an_operator_s_folder_is_not_taken_over_by_a_tenant(site: Site, refusal: Refusal) -> None:
    """A saved sum keeps versions, so that a folder in it stops being one."""
    compose = {"compose": [{"id": "shared-a"}, {"id": "shared-folder"}]}
    answer = site.ask("acme", "PUT", "/v1/adapters/acme-sum", compose)
    assert "'shared-folder'" in refusal(answer, 403, "compose")
    assert site.done("root", "GET", "/v1/adapters/shared-folder")["source"] == "folder"
    adapters = [{"id": "shared-a"}, {"id": "shared-folder"}]
    site.done("acme", "POST", "/v1/completions", model(prompt="Hi", adapters=adapters))
    site.done("root", "PUT", "/v1/adapters/acme-sum", compose)
    site.done("acme", "PUT", "/v1/adapters/acme-sum", compose)


def test_uploads_end_at_the_quota(site: Site, world: Worlds, refusal: Refusal) -> None:
    size = site.done("root", "GET", "/v1/adapters/acme-own")["bytes"]
    fitting = (8 << 10) // size
    assert fitting >= 3
    for seed in range(1, fitting):
        site.done("acme", "PUT", f"/v1/adapters/acme-{seed % 2}", FILES, seed=100 + seed)
    # The same content counts once, whatever its id is.
    site.done("acme", "PUT", "/v1/adapters/acme-again", FILES, seed=101)
    message = refusal(site.ask("acme", "PUT", "/v1/adapters/acme-2", FILES), 413, "files")
    assert f"would take {(fitting + 1) * size} bytes, but your quota is 8192" in message
    # Others have quotas of their own, or none.
    site.done("other", "PUT", "/v1/adapters/other-new", FILES)
    # What others have too is not free.
    refusal(site.ask("acme", "PUT", "/v1/adapters/acme-2", FILES), 413, "files")
    site.done("acme", "DELETE", "/v1/adapters/acme-own")
    site.done("acme", "PUT", "/v1/adapters/acme-2", FILES)
    assert world.staging == []


def test_a_full_store_does_not_tell_tenants_how_full_it_is(
    site: Site, world: Worlds, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.store.catalog, "total_bytes", lambda: 1 << 60)
    answer = site.ask("other", "PUT", "/v1/adapters/other-new", FILES)
    assert not any(digit in refusal(answer, 413, "files") for digit in "0123456789")
    assert str(1 << 60) in refusal(site.ask("root", "PUT", "/v1/adapters/x", FILES), 413, "files")
