"""`/v1/models`."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from polydelta.adapters_store.errors import StoreError


def test_the_base_comes_first_and_is_the_parent_of_the_adapters(client):
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    base, *adapters = body["data"]
    assert (base["id"], base["parent"]) == ("fake-base", None)
    assert [card["id"] for card in adapters] == ["dates", "labels"]
    assert {card["parent"] for card in adapters} == {"fake-base"}


def test_a_card_has_what_clients_read_and_no_path(client):
    card = client.get("/v1/models/dates").json()
    assert card.pop("created") > 0
    assert card == {
        "id": "dates",
        "object": "model",
        "owned_by": "polydelta",
        "root": "dates",
        "parent": "fake-base",
        "max_model_len": 64,
        "permission": [],
    }


@pytest.mark.parametrize("name", ["fake-base", "labels@1"])
def test_one_model_is_found_by_the_name_that_requests_use(client, name):
    assert client.get(f"/v1/models/{name}").json()["id"] == name


def test_an_unknown_model_is_404(client):
    answer = client.get("/v1/models/some/body")
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"


def test_a_catalog_that_does_not_answer_is_503(client, store, monkeypatch):
    def fail(*_: object) -> None:
        raise StoreError("The catalog is away.")

    for question in ("newest", "find", "known"):
        monkeypatch.setattr(store.catalog, question, fail)
    answers = [client.get(f"/v1/models{end}") for end in ("", "/dates", "/dates@1")]
    answers.append(client.post("/v1/completions", json={"model": "dates", "prompt": "Hi"}))
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["message"]) == (503, "The catalog is away.")
        # No field of the request is to blame.
        assert error["param"] is None


def test_the_base_can_be_served_under_another_name(make_app):
    client = TestClient(make_app(served_model_name="org/mine"))
    assert client.get("/v1/models").json()["data"][0]["id"] == "org/mine"
    assert client.get("/v1/models/org/mine").status_code == 200
    body = {"model": "org/mine", "prompt": "Hi"}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert client.post("/v1/completions", json=body | {"model": "fake-base"}).status_code == 404
