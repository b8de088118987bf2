"""Bad requests: each gets an error that names the field, the value and a way out."""

from __future__ import annotations

import pytest

from polydelta.engine.request import ErrorKind

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BOTH = (COMPLETIONS, CHAT)

OUT_OF_RANGE = [
    ("n", 0),
    ("n", 129),
    ("max_tokens", 0),
    ("max_tokens", "16"),
    ("max_tokens", True),
    ("max_tokens", 1.5),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 1.5),
    ("seed", 2**63),
    ("repetition_penalty", 0),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("stop", ["x"] * 17),
    ("stop", 5),
    ("stream", "yes"),
    ("logit_bias", [1]),
    ("stop_token_ids", ["a"]),
    ("priority", "high"),
    ("priority", 0.5),
    ("priority", 2**31),
    ("cache_salt", ""),
    ("cache_salt", 5),
]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(refusal, field, value):
    for path in BOTH:
        status, error = refusal(path, **{field: value})
        assert status == 400
        assert error["type"] == "BadRequestError"
        assert error["param"].split("[")[0] == field
        assert error["message"].startswith(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["audio"]),
        ("best_of", 3),
        ("suffix", "after"),
        ("prompt_logprobs", 1),
        ("no_such_field", 1),
    ],
)
def test_an_unsupported_field_is_refused_by_name(refusal, field, value):
    for path in BOTH:
        status, error = refusal(path, **{field: value})
        assert status == 400
        assert error["param"] == field
        assert "not supported" in error["message"]


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [True], {"a": 1}, 5])
def test_an_empty_or_malformed_prompt_is_refused(refusal, prompt):
    status, error = refusal(COMPLETIONS, prompt=prompt)
    assert (status, error["param"]) == (400, "prompt")


def test_a_missing_field_is_named(client):
    error = client.post(COMPLETIONS, json={"model": "fake-base"}).json()["error"]
    assert error["param"] == "prompt"
    assert "required" in error["message"]


def test_too_many_prompts_are_refused_with_the_limit(refusal):
    _, error = refusal(COMPLETIONS, prompt=["a"] * 1025)
    assert "1024" in error["message"]
    assert "1025" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", [1, 300]),
        ("prompt", [[1], [-1]]),
        ("stop_token_ids", [300]),
        ("logit_bias", {"300": 1}),
    ],
)
def test_a_token_id_out_of_the_vocabulary_is_refused_with_its_value(refusal, field, value):
    status, error = refusal(COMPLETIONS, **{field: value})
    assert (status, error["param"]) == (400, field)
    assert "300" in error["message"] or "-1" in error["message"]
    assert "299" in error["message"]


@pytest.mark.parametrize("key", ["a", "-1", "1.5", "", "9" * 5000])
def test_a_bad_logit_bias_key_is_refused_with_the_key(refusal, key):
    status, error = refusal(COMPLETIONS, logit_bias={key: 1})
    assert (status, error["param"]) == (400, "logit_bias")
    assert len(error["message"]) < 300


def test_a_logit_bias_out_of_range_is_refused(refusal):
    _, error = refusal(COMPLETIONS, logit_bias={"5": 101})
    assert error["param"] == "logit_bias.5"


def test_a_prompt_over_the_window_is_refused_with_both_numbers(refusal):
    for path, field in ((COMPLETIONS, "prompt"), (CHAT, "messages")):
        long = "p" * 100
        value = long if field == "prompt" else [{"role": "user", "content": long}]
        status, error = refusal(path, **{field: value})
        assert (status, error["param"]) == (400, field)
        assert "64" in error["message"]
        assert "100" in error["message"] or "106" in error["message"]


def test_a_prompt_that_fills_the_window_is_refused(refusal, engine):
    _, error = refusal(COMPLETIONS, prompt="p" * 64)
    assert error["param"] == "prompt"
    assert engine.requests == []


def test_max_tokens_over_the_room_is_refused_with_the_numbers(refusal):
    status, error = refusal(COMPLETIONS, prompt="p" * 60, max_tokens=5)
    assert (status, error["param"]) == (400, "max_tokens")
    for number in ("60", "5", "65", "64", "4"):
        assert number in error["message"]
    _, error = refusal(CHAT, max_completion_tokens=60)
    assert error["param"] == "max_completion_tokens"


def test_both_names_of_the_limit_at_once_are_refused(refusal):
    _, error = refusal(CHAT, max_tokens=4, max_completion_tokens=4)
    assert error["param"] == "max_completion_tokens"


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {}}, "text", {"type": "text"}])
def test_content_that_is_not_text_is_refused(refusal, part):
    status, error = refusal(CHAT, messages=[{"role": "user", "content": [part]}])
    assert (status, error["param"]) == (400, "messages[0].content")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": "x", "tool_calls": [1]}, "messages[0].tool_calls"),
        ("hello", "messages[0]"),
    ],
)
def test_a_malformed_message_is_refused_where_it_is_wrong(refusal, message, param):
    status, error = refusal(CHAT, messages=[message])
    assert (status, error["param"]) == (400, param)


def test_no_messages_are_refused(refusal):
    _, error = refusal(CHAT, messages=[])
    assert error["param"] == "messages"


def test_what_the_chat_template_refuses_is_told(refusal):
    _, error = refusal(CHAT, messages=[{"role": "assistant", "content": "x"}])
    assert error["param"] == "messages"
    assert "must not be the assistant's" in error["message"]


def test_logprobs_over_the_limit_are_refused(refusal):
    assert refusal(COMPLETIONS, logprobs=21)[1]["param"] == "logprobs"
    assert refusal(CHAT, logprobs=True, top_logprobs=21)[1]["param"] == "top_logprobs"
    assert refusal(CHAT, logprobs=5)[1]["param"] == "logprobs"


def test_top_logprobs_without_logprobs_are_refused(refusal):
    assert refusal(CHAT, top_logprobs=2)[1]["param"] == "top_logprobs"


def test_echo_with_logprobs_is_refused(refusal):
    assert refusal(COMPLETIONS, echo=True, logprobs=1)[1]["param"] == "echo"


def test_stream_options_without_stream_are_refused(refusal):
    for path in BOTH:
        _, error = refusal(path, stream_options={"include_usage": True})
        assert error["param"] == "stream_options"


def test_an_unknown_stream_option_is_refused(refusal):
    _, error = refusal(CHAT, stream=True, stream_options={"nope": 1})
    assert error["param"] == "stream_options.nope"


def test_an_unknown_model_is_404_even_for_a_stream(refusal):
    for path in BOTH:
        for stream in (False, True):
            status, error = refusal(path, model="nobody", stream=stream)
            assert (status, error["param"], error["type"]) == (404, "model", "NotFoundError")
            assert "nobody" in error["message"]


def test_an_adapter_that_cannot_be_served_is_400(refusal, engine):
    engine.error = "rank 0 in q_proj"
    status, error = refusal(CHAT, model="dates")
    assert (status, error["param"]) == (400, "model")
    assert "rank 0 in q_proj" in error["message"]


def test_a_request_that_the_engine_refuses_is_400(refusal, engine):
    engine.error = "needs 9 pages, the pool has 4"
    status, error = refusal(COMPLETIONS)
    assert (status, error["param"]) == (400, None)
    assert "9 pages" in error["message"]


@pytest.mark.parametrize("model", ["fake-base", "dates"])
def test_what_the_server_is_to_blame_for_is_503(refusal, engine, model):
    engine.error, engine.error_kind = "the disk does not answer", ErrorKind.SERVER
    for path in BOTH:
        status, error = refusal(path, model=model)
        assert (status, error["type"], error["param"]) == (503, "ServiceUnavailableError", None)
        assert "the disk does not answer" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "name"),
    [
        (ErrorKind.LATE, 429, "RateLimitError"),
        (ErrorKind.QUEUE_FULL, 503, "ServiceUnavailableError"),
    ],
)
@pytest.mark.parametrize(("seconds", "header"), [(None, "1"), (0.2, "1"), (3.0, "3"), (6.01, "7")])
def test_a_busy_server_says_when_to_come_back(
    client, engine, stream, kind, status, name, seconds, header
):
    engine.error, engine.error_kind, engine.retry_after = "too much to do", kind, seconds
    # It is not about the adapter.
    body = {"model": "dates", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == status
    assert answer.headers["retry-after"] == header
    assert answer.headers["content-type"] == "application/json"
    error = {"message": "too much to do", "type": name, "param": None, "code": status}
    assert answer.json() == {"error": error}


def test_other_refusals_do_not_say_when_to_come_back(client, engine):
    engine.error = "needs 9 pages, the pool has 4"
    answer = client.post(COMPLETIONS, json={"model": "fake-base", "prompt": "Hi"})
    assert answer.status_code == 400
    assert "retry-after" not in answer.headers


def test_a_dead_engine_is_503(refusal, engine):
    engine.alive = False
    for path in BOTH:
        for stream in (False, True):
            status, error = refusal(path, stream=stream)
            assert (status, error["type"]) == (503, "ServiceUnavailableError")


def test_prompts_and_choices_multiply_and_their_product_is_bounded(refusal):
    _, error = refusal(COMPLETIONS, prompt=["a"] * 9, n=128)
    assert error["param"] == "prompt"
    assert "9 prompts with n=128 are 1152 choices" in error["message"]


def test_long_values_are_cut_in_messages(refusal):
    _, error = refusal(COMPLETIONS, temperature="x" * 10_000)
    assert len(error["message"]) < 300
    _, error = refusal(COMPLETIONS, model="x" * 10_000)
    assert len(error["message"]) < 300
