"""vLLM's two routes for adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

# `World` of conftest.py.
Worlds = Any
Make = Callable[..., dict[str, bytes]]
Refusal = Callable[..., str]


def load(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/load_lora_adapter", json=body)


def unload(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/unload_lora_adapter", json=body)


def test_an_adapter_is_loaded_from_its_path_and_unloaded(
    client: TestClient, world: Worlds, make_lora: Make
) -> None:
    path = str(world.named_adapter("job", make_lora()))
    answer = load(client, lora_name="sql", lora_path=path)
    assert (answer.status_code, answer.text) == (
        200,
        "Success: LoRA adapter 'sql' added successfully.",
    )
    assert answer.headers["content-type"].startswith("text/plain")
    assert world.store.resolve("sql").version == 1
    answer = unload(client, lora_name="sql")
    assert (answer.status_code, answer.text) == (
        200,
        "Success: LoRA adapter 'sql' removed successfully.",
    )
    assert client.get("/v1/adapters").json()["data"] == []


def test_a_name_that_is_taken_needs_load_inplace(
    client: TestClient, world: Worlds, make_lora: Make, refusal: Refusal
) -> None:
    first = str(world.named_adapter("one", make_lora(0)))
    second = str(world.named_adapter("two", make_lora(1)))
    world.folder_adapter("f", make_lora(2))
    load(client, lora_name="sql", lora_path=first)
    for name in ("sql", "f"):
        answer = load(client, lora_name=name, lora_path=second)
        assert "has already been loaded" in refusal(answer, 400, "lora_name")
        answer = load(client, lora_name=name, lora_path=second, load_inplace=True)
        assert answer.status_code == 200
        assert world.store.resolve(name).version == 2


def test_a_name_is_free_again_after_it_was_unloaded(
    client: TestClient, world: Worlds, make_lora: Make
) -> None:
    path = str(world.named_adapter("one", make_lora()))
    for _ in range(2):
        assert load(client, lora_name="sql", lora_path=path).status_code == 200
        assert unload(client, lora_name="sql", lora_int_id=7).status_code == 200


def test_a_path_outside_the_allowed_roots_is_refused(
    client: TestClient, world: Worlds, make_lora: Make, refusal: Refusal
) -> None:
    allowed = world.root / "allowed"
    (allowed / "link").symlink_to(world.root)
    world.folder_adapter("f", make_lora())
    for path in ("/", "relative", f"{allowed}/../folders/f", f"{allowed}/link/folders/f", "\0"):
        message = refusal(load(client, lora_name="x", lora_path=path), 400, "lora_path")
        assert "--adapter-root" in message
    answer = load(client, lora_name="x", lora_path=str(allowed / "none"))
    assert "cannot be read" in refusal(answer, 400, "lora_path")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "lora_name"),
        ({"lora_name": "", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "x", "lora_path": ""}, "lora_path"),
        ({"lora_name": "../x", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "base", "lora_path": "/x"}, "id"),
        ({"lora_name": 7, "lora_path": "/x"}, "lora_name"),
    ],
    ids=range(6),
)
def test_a_bad_body_is_refused_by_name(
    body: dict[str, Any], param: str, client: TestClient, refusal: Refusal
) -> None:
    refusal(load(client, **body), 400, param)


def test_fields_that_vllm_ignores_are_ignored(
    client: TestClient, world: Worlds, make_lora: Make
) -> None:
    path = str(world.named_adapter("one", make_lora()))
    answer = load(client, lora_name="x", lora_path=path, lora_int_id=3, is_3d_lora_weight=False)
    assert answer.status_code == 200


def test_what_cannot_be_unloaded_is_refused(
    client: TestClient, world: Worlds, make_lora: Make, refusal: Refusal
) -> None:
    refusal(unload(client, lora_name="none"), 404, "id")
    refusal(unload(client), 400, "lora_name")
    world.folder_adapter("f", make_lora())
    refusal(unload(client, lora_name="f"), 409, "id")


def test_an_adapter_in_use_goes_when_its_requests_are_done(
    client: TestClient, world: Worlds, make_lora: Make
) -> None:
    path = str(world.named_adapter("one", make_lora()))
    load(client, lora_name="x", lora_path=path)
    with world.store.lease([("x", 1.0)]):
        assert unload(client, lora_name="x").status_code == 200
        assert client.get("/v1/adapters/x@1").json()["state"] == "deleting"
