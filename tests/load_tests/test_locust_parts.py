"""What Locust's users are made of: reading a stream, choosing a model, making an upload."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from load_tests.locust_models import Models
from load_tests.locust_stream import Answer, StreamError, read_stream
from load_tests.locust_uploads import AdapterFiles, with_new_content

BASE = {"id": "base", "parent": None}
TEXT = 'data: {"choices": [{"text": "a"}], "usage": null}'
USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 3}}'


def lines(*events: str) -> Iterator[bytes]:
    """As they come from the wire, then nothing for ever."""
    for event in events:
        yield from (f"{event}\n".encode(), b"\n")
    while True:
        yield b""


def test_a_chat_is_read_past_its_role_and_keep_alives():
    source = lines(
        'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}',
        ": ping",
        'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}',
        'data: {"choices": [{"delta": {"content": "yes"}}]}',
        'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}',
        "data:[DONE]",
    )
    answer = Answer()
    read_stream(lambda: next(source), answer)
    assert (answer.pieces, answer.tokens, answer.complete) == (2, 2, True)
    assert answer.first is not None
    assert answer.last is not None
    assert answer.seconds_per_token == answer.last - answer.first > 0


def test_who_leaves_reads_no_further():
    source = lines(*[TEXT] * 5)
    answer = Answer()
    read_stream(lambda: next(source), answer, leave_after=2)
    assert (answer.pieces, answer.left, answer.seconds_per_token) == (2, True, None)
    assert next(source) == b"\n"
    assert next(source).startswith(b"data")
    nothing = Answer()
    read_stream(lambda: pytest.fail("read"), nothing, leave_after=0)
    assert nothing.left


def test_an_answer_that_breaks_off_keeps_its_first_token():
    source, answer = lines(TEXT, TEXT, USAGE), Answer()
    with pytest.raises(StreamError):
        read_stream(lambda: next(source), answer)
    assert answer.first is not None
    assert answer.seconds_per_token is None


def test_new_content_has_the_same_tensors():
    tensors = {"b": np.arange(7, dtype=np.float16), "a": np.ones((2, 3), dtype=np.int32)}
    weights = save(tensors, metadata={"format": "pt"})
    changed = [with_new_content(weights) for _ in range(2)]
    assert len({weights, *changed}) == 3
    for file in changed:
        assert {name: value.tolist() for name, value in load(file).items()} == {
            name: value.tolist() for name, value in tensors.items()
        }
        (length,) = struct.unpack_from("<Q", file)
        assert length % 8 == 0
        assert json.loads(file[8 : 8 + length])["__metadata__"]["format"] == "pt"


def test_a_folder_is_an_adapter_or_has_some(tmp_path: Path):
    with pytest.raises(ValueError, match="no adapter"):
        AdapterFiles(tmp_path)
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    (tiny / "adapter_config.json").write_text('{"r": 1}')
    (tiny / "adapter_model.safetensors").write_bytes(save({"a": np.ones(3, dtype=np.float32)}))
    for folder in (tmp_path, tiny):
        form = AdapterFiles(folder).form("an-id")
        assert form.body.count(b'name="files"') == 2
        assert b'name="id"\r\n\r\nan-id\r\n' in form.body
    assert b'name="id"' not in AdapterFiles(tmp_path).form().body


def test_models_are_chosen_by_the_power_distribution():
    models = Models([BASE, *({"id": str(number), "parent": "base"} for number in range(3))])
    chosen = Counter(models.choose(0.5) for _ in range(4000))
    # The density's integral is x^alpha.
    shares = np.diff(np.arange(5) ** 0.5 / 2)
    for name, share in zip(["base", "0", "1", "2"], shares, strict=True):
        assert chosen[name] / 4000 == pytest.approx(share, abs=0.05)


def test_uploaded_models_come_and_go():
    models = Models([BASE, {"id": "old", "parent": "base"}])
    models.add("new")
    assert [models.kind(name) for name in ("base", "old", "new")] == ["base", "adapter", "uploaded"]
    assert "new" in models
    models.withdraw("new")
    models.withdraw("new")
    assert "new" not in models
    assert len(models) == 2
    assert Models([], ["named"]).choose(1.0) == "named"
    with pytest.raises(ValueError, match="no model"):
        Models([])
