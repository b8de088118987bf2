"""Damaged requests of every kind: taken, or refused with a reason; soon, and nothing stays."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest

# `World` of conftest.py.
Worlds = Any
Make = Callable[..., dict[str, bytes]]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Seconds of one request, a thousand times what it takes.
PATIENCE = 30.0

SNIPPETS = (
    b"\r\n",
    b"\r\n\r\n",
    b"--sep\r\n",
    b"--sep--\r\n",
    b"--sep",
    b"\0",
    b"\xff",
    b'"',
    b";",
    b": ",
    b'filename="',
    b'name="id"',
    b"../",
    b"X: y\r\n",
)


def flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 16))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def leave_out(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + content[at + rng.choice((1, 2, 8, 64, 512)) :]


def insert(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + rng.choice(SNIPPETS) * rng.choice((1, 2, 50)) + content[at:]


def double(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start : start + rng.randrange(400)] + content[start:]


MUTATIONS = (flip, cut, leave_out, insert, double)


def pieces(rng: random.Random, content: bytes) -> list[bytes]:
    """The content cut anywhere."""
    places = sorted(rng.randrange(len(content) + 1) for _ in range(rng.choice((0, 1, 5))))
    return [content[a:b] for a, b in zip([0, *places], [*places, len(content)], strict=True)]


@pytest.fixture
def outcome(world: Worlds, send_async: Callable[..., Any]) -> Callable[..., Any]:
    """The status of a request, once its answer is known to be a good one."""

    async def outcome(chunks: list[bytes], **options: Any) -> int:
        request = send_async(world.app, chunks, **options)
        answer = await asyncio.wait_for(request, PATIENCE)
        body = answer.json()
        if answer.status_code >= 400:
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert body["error"]["code"] == answer.status_code < 500
            assert 0 < len(body["error"]["message"]) < 1500
            assert str(world.root / "store") not in body["error"]["message"]
        else:
            assert answer.status_code in (200, 201)
            assert body["object"] == "adapter"
        assert world.staging == []
        return int(answer.status_code)

    return outcome


def tally(outcome: Any, requests: Any) -> Counter[int]:
    async def all_of_them() -> Counter[int]:
        return Counter([await outcome(chunks, **options) for chunks, options in requests])

    return asyncio.run(all_of_them())


@pytest.fixture
def body(make_form: Callable[..., bytes], make_lora: Make) -> bytes:
    files = make_lora()
    return make_form(
        ("id", None, b"sql"),
        ("files", CONFIG, files[CONFIG]),
        ("labels", None, b'{"team": "a"}'),
        ("files", WEIGHTS, files[WEIGHTS]),
        ("files", "README.md", b"# Mine"),
    )


def test_a_changed_form_is_taken_or_refused(outcome: Any, body: bytes) -> None:
    rng = random.Random(0)
    requests = []
    for _ in range(1000):
        # Most of the body is weights, whose bytes matter less than the lines between the parts.
        head = body[:600] if rng.random() < 0.5 else body
        changed = rng.choice(MUTATIONS)(rng, head) + body[len(head) :]
        requests.append((pieces(rng, changed), {"leave": rng.random() < 0.2}))
    statuses = tally(outcome, requests)
    assert statuses[400] > 300
    assert statuses[200] + statuses[201] > 20
    assert statuses[499] > 0


def test_a_changed_file_is_taken_or_refused(
    outcome: Any, make_form: Callable[..., bytes], make_lora: Make, packers: Mapping[str, Any]
) -> None:
    rng = random.Random(1)
    sound = make_lora()
    requests = []
    for _ in range(500):
        name = rng.choice((CONFIG, WEIGHTS))
        content = sound[name]
        # The header of the weights, or anything.
        head = content[:200] if rng.random() < 0.7 else content
        changed = {**sound, name: rng.choice(MUTATIONS)(rng, head) + content[len(head) :]}
        if rng.random() < 0.3:
            archive = rng.choice(list(packers))
            changed = {archive: rng.choice(MUTATIONS)(rng, packers[archive](changed))}
        files = [("files", name, content) for name, content in changed.items()]
        requests.append((pieces(rng, make_form(("id", None, b"sql"), *files)), {}))
    statuses = tally(outcome, requests)
    assert statuses[400] > 50


def test_a_changed_content_type_is_taken_or_refused(outcome: Any, body: bytes) -> None:
    rng = random.Random(2)
    good = b"multipart/form-data; boundary=sep"
    types = [rng.choice(MUTATIONS)(rng, good) for _ in range(300)]
    statuses = tally(outcome, [([body], {"content_type": kind}) for kind in types])
    assert statuses[400] > 100


def test_changed_json_is_taken_or_refused(
    outcome: Any, world: Worlds, make_lora: Make, make_form: Callable[..., bytes]
) -> None:
    rng = random.Random(3)
    folder = world.named_adapter("job", make_lora(1))
    files = [("files", name, content) for name, content in make_lora().items()]
    bodies = [
        {"id": "sum", "compose": [{"id": "a", "weight": 0.5}, {"id": "a@1"}], "labels": {"a": "b"}},
        {"id": "job", "path": str(folder), "labels": {"a": "b"}},
    ]
    odd: list[Any] = [None, True, -1, 1e308, 10**400, "", "\0", "\ud800", "x" * 3000, [], {}, [[]]]
    requests: list[Any] = [([make_form(("id", None, b"a"), *files)], {})]
    for _ in range(500):
        body = dict(rng.choice(bodies))
        if rng.random() < 0.5:
            body[rng.choice([*body, "id", "more"])] = rng.choice(odd)
            content = json.dumps(body).encode()
        else:
            content = rng.choice(MUTATIONS)(rng, json.dumps(body).encode())
        put = rng.random() < 0.3
        options = {"method": "PUT", "path": "/v1/adapters/sum"} if put else {}
        requests.append((pieces(rng, content), {"content_type": "application/json", **options}))
    statuses = tally(outcome, requests)
    assert statuses[400] > 80
