"""Adapters of many kinds on one real server: uploaded at once, mixed, and swapped under one id."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# What becomes of each adapter of `uploaded`.
KINDS = {
    "lora": ["LowRank"],
    "dora": ["LowRank", "Scale"],
    "ia3": ["Scale"],
    "shira": ["Sparse"],
    "loha": ["LowRank"],
    "prefix": ["Prefix"],
    "prompt": ["Prompt"],
    "tokens": ["TokenRows"],
    "norms": ["NormWeight"],
    "alora": ["Invocation", "LowRank"],
    "s2ft": ["Columns", "Rows"],
    "bitdelta": ["OneBit"],
}
# Of the folder's prompt.
PROMPT_TOKENS = 9
# " Answer briefly:", which calls `alora`.
INVOCATION = [19842, 13099, 42]
# Tokens of an answer that is in flight while a version is uploaded.
LONG = 24


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_uploads_of_all_kinds_at_once_are_taken_and_shown_by_their_kinds(api, uploaded):
    assert uploaded.keys() == KINDS.keys()
    listed = {model.id for model in api.client.models.list()}
    for name, answer in uploaded.items():
        assert answer.status_code == 201, answer.text
        assert answer.json()["kinds"] == KINDS[name]
        assert name in listed
        record = api.call("GET", f"/v1/adapters/{name}").json()
        assert (record["kinds"], record["state"]) == (KINDS[name], "ready")
    page = api.call("GET", "/v1/adapters", params={"kind": "Prefix"}).json()
    assert "prefix" in {record["id"] for record in page["data"]}
    assert all("Prefix" in record["kinds"] for record in page["data"])


def test_all_kinds_together_answer_as_each_alone(api, uploaded):
    def complete(name: str) -> tuple[str, int]:
        done = api.complete(name)
        return done.choices[0].text, done.usage.prompt_tokens

    def chat(name: str) -> tuple[str, int]:
        done = api.chat(name)
        return done.choices[0].message.content, done.usage.prompt_tokens

    names = [api.base, *uploaded]
    questions = [(route, name) for name in names for route in (complete, chat)]
    with ThreadPoolExecutor(len(questions)) as clients:
        together = list(clients.map(lambda question: question[0](question[1]), questions))
    assert together == [route(name) for route, name in questions]
    # Virtual tokens are not the client's.
    completions, chats = together[::2], together[1::2]
    assert {count for _, count in completions} == {PROMPT_TOKENS}
    assert len({count for _, count in chats}) == 1
    texts = dict(zip(names, [text for text, _ in completions], strict=True))
    silent = {name for name in uploaded if texts[name] == texts[api.base]}
    # This prompt does not call it.
    assert silent == {"alora"}, "adapters that do nothing"
    until(lambda: api.pages()["kv"] == 0)


@pytest.mark.usefixtures("uploaded")
def test_an_activated_lora_that_is_not_called_is_the_base(api):
    assert api.chat("alora").choices == api.chat(api.base).choices
    base, alora = (api.complete(name, max_tokens=LONG) for name in (api.base, "alora"))
    assert alora.choices == base.choices
    assert alora.usage.prompt_tokens == base.usage.prompt_tokens


@pytest.mark.usefixtures("uploaded")
@pytest.mark.parametrize("base_first", [True, False])
def test_what_comes_before_an_invocation_is_shared_with_the_base(api, base_first):
    # 50 tokens, which fill three pages and which nobody else has; then three that call it.
    prompt = [*range(1000 + base_first, 1050 + base_first), *INVOCATION, 260, 1573]
    names = [api.base, "alora"] if base_first else ["alora", api.base]
    first, second = (api.complete(name, prompt=prompt, logprobs=1) for name in names)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 48
    assert first.usage.prompt_tokens == second.usage.prompt_tokens == len(prompt)
    assert first.choices[0].logprobs.token_logprobs != second.choices[0].logprobs.token_logprobs


class Stream:
    """A streamed request of its own thread, whose first token has come."""

    def __init__(self, api: Any, model: str) -> None:
        self._begun = threading.Event()
        self._reader = ThreadPoolExecutor(1)
        self._text = self._reader.submit(self._read, api, model)
        assert self._begun.wait(60)

    def text(self) -> str:
        with self._reader:
            return self._text.result(60)

    def _read(self, api: Any, model: str) -> str:
        pieces, reason = [], None
        for chunk in api.complete(model, max_tokens=LONG, stream=True):
            pieces.append(chunk.choices[0].text)
            reason = chunk.choices[0].finish_reason
            self._begun.set()
        assert reason == "length"
        return "".join(pieces)


@contextmanager
def traffic(api: Any, wanted: Mapping[str, str]) -> Iterator[None]:
    """Other requests, again and again, each compared with its own answer."""
    stop = threading.Event()

    def run() -> int:
        count = 0
        while not stop.is_set():
            for name, text in wanted.items():
                assert api.text(name) == text, name
                count += 1
        return count

    with ThreadPoolExecutor(1) as client:
        counted = client.submit(run)
        try:
            yield
        finally:
            stop.set()
        assert counted.result() > 0


@pytest.mark.usefixtures("uploaded")
def test_one_id_changes_its_kind_under_traffic(api, folders):
    order, in_flight = ["lora", "prefix", "bitdelta", "dora", "lora"], 0
    long = {name: api.text(name, max_tokens=LONG) for name in order}
    short = {name: api.text(name) for name in (*order, api.base, "ia3", "alora")}
    assert len({short[name] for name in order}) == len({*long.values()}) == 4
    until(lambda: api.pages()["kv"] == 0)
    before = api.pages()
    version = api.upload("bot", folders[order[0]]).json()["version"]
    with traffic(api, {name: short[name] for name in (api.base, "ia3", "alora")}):
        for old, new in pairwise(order):
            streams = [Stream(api, "bot"), Stream(api, f"bot@{version}")]
            record = api.upload("bot", folders[new]).json()
            in_flight += api.call("GET", f"/v1/adapters/bot@{version}").json()["active_requests"]
            assert (record["version"], record["kinds"]) == (version + 1, KINDS[new])
            assert api.text("bot") == short[new]
            assert [stream.text() for stream in streams] == [long[old]] * 2
            version += 1
    # Or every upload came after its streams.
    assert in_flight > 0
    deleted = api.call("DELETE", "/v1/adapters/bot?in_use=defer").json()["data"]
    assert [record["kinds"] for record in deleted] == [KINDS[name] for name in order]
    until(lambda: api.call("GET", "/v1/adapters/bot/versions").status_code == 404)
    until(lambda: api.pages() == before)
