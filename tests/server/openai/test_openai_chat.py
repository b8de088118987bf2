"""`/v1/chat/completions`, whole bodies."""

from __future__ import annotations


def test_a_chat_completion_has_openai_s_shape(chat):
    body = chat()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello"},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["completion_tokens"] == 5


def test_the_messages_go_through_the_chat_template(chat, engine):
    chat(
        messages=[
            {"role": "system", "content": "S"},
            {"role": "user", "content": "U", "name": "ann"},
            {"role": "assistant", "content": "A", "refusal": None, "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ]
    )
    assert bytes(engine.requests[0].prompt_token_ids) == b"system:S;user:U;assistant:A;user:a;"


def test_text_parts_are_joined_by_line(chat, engine):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat(messages=[{"role": "user", "content": parts}])
    assert bytes(engine.requests[0].prompt_token_ids) == b"user:one\ntwo;"


def test_the_developer_speaks_as_the_system(chat, engine):
    chat(messages=[{"role": "developer", "content": "D"}, {"role": "user", "content": "U"}])
    assert bytes(engine.requests[0].prompt_token_ids) == b"system:D;user:U;"


def test_the_answer_may_fill_the_window_when_no_limit_is_given(chat, engine):
    chat()
    assert engine.requests[0].sampling.max_tokens == 64 - len("user:Hi;")


def test_both_names_of_the_limit_work(chat):
    assert chat(max_tokens=2)["choices"][0]["message"]["content"] == "He"
    assert chat(max_completion_tokens=3)["choices"][0]["message"]["content"] == "Hel"


def test_logprobs_carry_bytes_and_alternatives(chat):
    content = chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    assert content[0] == {
        "token": "H",
        "logprob": -1.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "I", "logprob": -0.25, "bytes": [73]},
            {"token": "H", "logprob": -1.5, "bytes": [72]},
        ],
    }


def test_logprobs_without_alternatives(chat):
    content = chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"] == []


def test_priority_and_salt_reach_the_engine(chat, engine):
    chat(n=2, priority=7, cache_salt="mine")
    assert [(r.priority, r.cache_salt) for r in engine.requests] == [(7, "mine")] * 2


def test_n_greedy_choices_are_the_same(chat):
    choices = chat(n=3, temperature=0)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in choices} == {"Hello"}


def test_values_that_ask_for_nothing_are_taken(chat):
    chat(response_format={"type": "text"}, tools=[], tool_choice="none", parallel_tool_calls=True)


def test_an_adapter_answers(chat, engine):
    engine.answer = lambda request: request.adapters[0].ref.id
    body = chat(model="dates")
    assert body["choices"][0]["message"]["content"] == "dates"
    assert body["model"] == "dates"
