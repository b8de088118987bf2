"""Server-sent events of both routes."""

from __future__ import annotations

import json

import pytest

from polydelta.engine.request import FinishReason, RequestError, RequestOutput
from polydelta.server.openai.responses import Completion, CompletionChoice
from polydelta.server.openai.schemas import StreamOptions
from polydelta.server.openai.stream import ChunkWriter, reason
from polydelta.server.openai.usage import UsageCount

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def test_completion_chunks_add_up_to_the_text(stream):
    chunks = stream(COMPLETIONS)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello"
    assert all("usage" not in chunk for chunk in chunks)


def test_the_finish_reason_is_in_the_last_chunk_only(stream):
    for path in (COMPLETIONS, CHAT):
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in stream(path)]
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]


def test_the_first_chat_chunk_of_each_choice_carries_the_role(stream):
    chunks = stream(CHAT, n=2)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in (0, 1):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all("role" not in delta for delta in deltas[1:])
        assert "".join(delta.get("content", "") for delta in deltas) == "Hello"


def test_usage_comes_in_a_chunk_of_its_own_without_choices(stream):
    for path in (COMPLETIONS, CHAT):
        *chunks, last = stream(path, stream_options={"include_usage": True})
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 5


def test_continuous_usage_never_falls(stream):
    chunks = stream(
        CHAT, n=2, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 10


def test_echo_comes_first(stream):
    texts = [c["choices"][0]["text"] for c in stream(COMPLETIONS, prompt="Hi ", echo=True)]
    assert texts[0] == "Hi "
    assert "".join(texts) == "Hi Hello"


def test_text_that_is_held_back_makes_no_chunk(stream, engine):
    engine.answer = lambda _: "aé!"
    texts = [chunk["choices"][0]["text"] for chunk in stream(COMPLETIONS)]
    assert texts == ["a", "!"]


def test_logprobs_are_streamed_even_while_text_is_held_back(stream, engine):
    engine.answer = lambda _: "é!"
    chunks = stream(COMPLETIONS, logprobs=0)
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert offsets == [[0], [0], [1]]
    tokens = [
        entry["token"]
        for chunk in stream(CHAT, logprobs=True)[1:]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert len(tokens) == 3


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_error_before_the_first_output_has_its_own_status(refusal, engine, path):
    engine.error = "shapes do not fit"
    # Echoed prompts and roles do not need the engine, and wait all the same.
    fields = {"echo": True} if path == COMPLETIONS else {}
    status, error = refusal(path, model="dates", stream=True, n=2, **fields)
    assert (status, error["param"]) == (400, "model")
    assert "shapes do not fit" in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_error_in_mid_stream_is_an_event_and_then_done(stream, engine, path):
    engine.error, engine.error_after = "shapes do not fit", 2
    *chunks, last = stream(path, model="dates")
    assert all("choices" in chunk for chunk in chunks)
    assert last["error"]["code"] == 400
    assert last["error"]["param"] == "model"
    assert "shapes do not fit" in last["error"]["message"]


def test_one_failed_choice_aborts_the_others(refusal, engine):
    submit = engine.submit

    def submit_first_to_fail(request, on_output):
        if engine.requests:
            submit(request, on_output)
            return
        engine.requests.append(request)
        on_output(
            RequestOutput(
                request.request_id,
                "",
                (),
                finish_reason=FinishReason.ERROR,
                error=RequestError("no room"),
            )
        )

    engine.submit = submit_first_to_fail
    engine.endless = True
    status, error = refusal(COMPLETIONS, stream=True, n=4)
    assert (status, error["message"]) == (400, "no room")
    assert engine.aborted == {request.request_id for request in engine.requests[1:]}
    assert len(engine.aborted) == 3


def test_a_bug_in_mid_stream_is_an_event_too(stream, engine):
    engine.tokenizer.token_bytes = lambda _: 1 / 0
    events = stream(COMPLETIONS, logprobs=1)
    assert events[-1]["error"]["code"] == 500
    assert "division" not in events[-1]["error"]["message"]


class OneReply:
    """Makes chunks; in its model's name there is what looks like the place of a text."""

    def __init__(self):
        self.usage = UsageCount([[1, 2]], 3)
        self.made = 0

    def opening(self):
        return []

    def closing(self):
        return []

    def chunk(self, index, output):
        self.made += 1
        choice = CompletionChoice(
            index=index,
            text=output.text,
            logprobs=None,
            finish_reason=reason(output),
            stop_reason=output.stop_reason,
        )
        return Completion(
            id="cmpl-1",
            object="text_completion",
            created=1,
            model='"text":"\\u0000"',
            choices=[choice],
            usage=None,
        )


@pytest.mark.parametrize(
    "text",
    [
        "a",
        '"',
        "\\",
        "\n\r\t\b\f",
        "\0",
        "\x1b\x7f",
        "\u2028 é \N{SNOWMAN} 😀",
        "</script>",
        "null",
    ],
)
def test_a_chunk_of_text_alone_is_written_as_pydantic_writes_it(text):
    reply = OneReply()
    writer = ChunkWriter(reply, StreamOptions())
    for index in (0, 2):
        output = RequestOutput("r", text, (1,))
        (written,) = writer.write([(index, output)])
        assert written == reply.chunk(index, output).model_dump_json(exclude_unset=True)


def test_chunks_of_text_alone_are_made_once_for_each_choice():
    reply = OneReply()
    writer = ChunkWriter(reply, StreamOptions())
    outputs = [(place % 2, RequestOutput("r", f"word {place}", (1,))) for place in range(9)]
    written = writer.write([*outputs, (0, RequestOutput("r", "", (1,)))])
    assert [json.loads(one)["choices"][0]["text"] for one in written] == [
        f"word {place}" for place in range(9)
    ]
    assert reply.made == 2
    last = RequestOutput("r", "end", (1,), finish_reason=FinishReason.LENGTH)
    (written,) = writer.write([(0, last)])
    assert json.loads(written)["choices"][0]["finish_reason"] == "length"
    assert reply.usage.usage().completion_tokens == 11
