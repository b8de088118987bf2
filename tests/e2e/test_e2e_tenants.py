"""Customers who share a server, each through an `openai` client with its own key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

QUOTA = 120_000
TENANTS = f"""
[acme]
keys = ["sk-acme"]
adapters = ["shared-*"]
uploads = ["acme-*"]

[rival]
keys = ["sha256:{hashlib.sha256(b"sk-rival").hexdigest()}"]
adapters = ["shared-*"]
uploads = ["rival-*"]
private_cache = true

[small]
keys = ["sk-small"]
uploads = ["small-*"]
upload_quota = {QUOTA}

[trial]
keys = ["sk-trial"]
tokens_per_minute = 40
max_concurrent = 2
"""
# Several blocks of the cache.
PROMPT = "Nobody else may know whether this was asked before, however often it is asked again. " * 2


class Customer:
    """What one key can do."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        url = f"{self._url}{path}"
        return httpx.request(method, url, headers=self._headers, timeout=60, **options)

    def put(self, adapter_id: str, folder: Path) -> httpx.Response:
        files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
        return self.call("PUT", f"/v1/adapters/{adapter_id}", files=files)

    def publish(self, adapter_id: str, folder: Path) -> str:
        answer = self.put(adapter_id, folder)
        assert answer.status_code in (200, 201), answer.text
        return adapter_id

    def ask(self, model: str, **options: Any) -> Any:
        options = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0} | options
        return self.openai.completions.create(model=model, **options)

    def cached(self, model: str, **options: Any) -> int:
        """Tokens of the prompt that need not be computed."""
        return int(self.ask(model, **options).usage.prompt_tokens_details.cached_tokens)


@pytest.fixture(scope="module")
def url(launch, tiny_file, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("tenants")
    (root / "tenants.toml").write_text(TENANTS)
    (root / "none").mkdir()
    options = ("--model", tiny_file, "--adapters", root / "none", "--api-key", "sk-operator")
    return str(launch(*map(str, options), "--tenants", str(root / "tenants.toml")).url)


@pytest.fixture
def customer(url: str) -> Callable[[str], Customer]:
    return lambda name: Customer(url, f"sk-{name}")


@pytest.fixture
def folder(adapter_writer, tiny_file_layout) -> Callable[[int], Path]:
    """An adapter; another seed is another content."""
    writer = adapter_writer(tiny_file_layout)
    return cache(lambda seed: writer.lora(f"of-{seed}", 4, seed=seed))


@pytest.fixture
def base(customer: Callable[[str], Customer]) -> str:
    return next(iter(customer("acme").openai.models.list())).id


def test_each_customer_has_its_own_adapters_and_the_shared_ones(customer, folder, base):
    acme, rival, operator = map(customer, ("acme", "rival", "operator"))
    operator.publish("shared-date", folder(1))
    acme.publish("acme-bot", folder(2))
    rival.publish("rival-bot", folder(3))
    for who, own in ((acme, "acme-bot"), (rival, "rival-bot")):
        assert {card.id for card in who.openai.models.list()} == {base, own, "shared-date"}
        for model in (base, own, "shared-date", f"{own}@1"):
            assert who.ask(model).usage.completion_tokens > 0
            chat = [{"role": "user", "content": "Hi"}]
            assert who.openai.models.retrieve(model).id == model
            who.call("POST", "/v1/chat/completions", json={"model": model, "messages": chat})
    sums = {"adapters": [{"id": "acme-bot", "weight": 0.5}, {"id": "shared-date"}]}
    acme.ask(base, extra_body=sums)
    with pytest.raises(openai.NotFoundError):
        rival.ask(base, extra_body=sums)


def test_a_hidden_adapter_is_as_good_as_none(customer, folder):
    acme, rival = customer("acme"), customer("rival")
    rival.publish("rival-secret", folder(4))

    def refused(model: str) -> tuple[object, ...]:
        with pytest.raises(openai.NotFoundError) as caught:
            acme.ask(model)
        error = caught.value
        return error.status_code, error.param, error.message.replace(model, "...")

    assert refused("rival-secret") == refused("rival-nobody") == refused("acme-nobody")
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/versions"), ("POST", "/load")):
        answers = [
            acme.call(method, f"/v1/adapters/{name}{path}")
            for name in ("rival-secret", "rival-nobody")
        ]
        assert [answer.status_code for answer in answers] == [404, 404]
        texts = [answer.text.replace("secret", "nobody") for answer in answers]
        assert texts[0] == texts[1]
    assert "rival" not in acme.call("GET", "/v1/adapters").text
    assert rival.ask("rival-secret").usage.completion_tokens > 0


def test_what_is_shared_is_the_operator_s_to_change(customer, folder):
    acme, operator = customer("acme"), customer("operator")
    operator.publish("shared-style", folder(5))
    for method, path in (("DELETE", ""), ("POST", "/pin"), ("POST", "/evict")):
        assert acme.call(method, f"/v1/adapters/shared-style{path}").status_code == 403
    assert acme.put("shared-style", folder(6)).status_code == 403
    assert acme.put("rival-new", folder(6)).status_code == 403
    assert customer("trial").put("trial-bot", folder(6)).status_code == 403
    assert operator.call("POST", "/v1/adapters/shared-style/pin").status_code == 200
    assert operator.call("DELETE", "/v1/adapters/shared-style").status_code == 200


def test_uploads_end_at_the_quota_of_their_tenant(customer, folder):
    small = customer("small")
    for number in count():
        answer = small.put(f"small-{number}", folder(10 + number))
        if answer.status_code != 201:
            break
    assert answer.status_code == 413
    assert f"your quota is {QUOTA}" in answer.text
    records = small.call("GET", "/v1/adapters").json()["data"]
    total = sum(record["bytes"] for record in records)
    assert len(records) == number >= 2
    assert QUOTA - records[0]["bytes"] < total <= QUOTA
    # Others may go on, and so may this one when it has made room.
    assert customer("acme").put("acme-more", folder(10 + number)).status_code == 201
    assert small.call("DELETE", "/v1/adapters/small-0").status_code == 200
    assert small.put(f"small-{number}", folder(10 + number)).status_code == 201


def test_one_content_under_two_ids_shares_no_prefix(customer, folder):
    acme, rival = customer("acme"), customer("rival")
    acme.publish("acme-twin", folder(7))
    rival.publish("rival-twin", folder(7))
    assert acme.cached("acme-twin") == 0
    assert acme.cached("acme-twin") > 0
    assert rival.cached("rival-twin") == 0
    assert rival.cached("rival-twin") > 0


def test_a_private_cache_is_private_even_for_the_base(customer, base):
    acme, rival = customer("acme"), customer("rival")
    prompt = f"A prompt that no other test has. {PROMPT}"
    assert acme.cached(base, prompt=prompt) == 0
    # Not private, so that whoever may use the base finds it.
    assert customer("small").cached(base, prompt=prompt) > 0
    assert rival.cached(base, prompt=prompt) == 0
    assert rival.cached(base, prompt=prompt) > 0
    assert acme.cached(base, prompt=prompt, extra_body={"cache_salt": "rival:"}) == 0


def test_a_customer_who_has_used_its_tokens_up_waits_alone(customer, base):
    trial, acme = customer("trial"), customer("acme")
    with pytest.raises(openai.BadRequestError):
        trial.ask(base, n=3)
    # Into debt: how long an answer gets is not known before.
    assert trial.ask(base, max_tokens=32).usage.total_tokens > 40
    with pytest.raises(openai.RateLimitError) as caught:
        trial.ask(base)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        list(trial.ask(base, stream=True))
    assert acme.ask(base).usage.completion_tokens > 0


def test_only_operators_see_the_metrics_and_strangers_nothing(customer, url):
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert customer("acme").call("GET", "/metrics").status_code == 403
    assert customer("operator").call("GET", "/metrics").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        customer("nobody").openai.models.list()
