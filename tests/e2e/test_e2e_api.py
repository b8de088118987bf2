"""The OpenAI routes of a real server, through the `openai` client."""

from __future__ import annotations

import math

import httpx
import openai
import pytest

PROMPT = "The capital of France is"
# The token " Paris" of the default model.
PARIS = 7042
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_models_are_the_base_and_the_samples(client, base, samples):
    cards = client.models.list().data
    assert cards[0].id == base
    assert {card.id for card in cards[1:]} == set(samples)
    assert all(card.parent == base for card in cards[1:])
    assert client.models.retrieve(samples[0]).id == samples[0]


def test_a_completion_continues_its_prompt(client, base):
    done = client.completions.create(model=base, prompt=PROMPT, max_tokens=8, temperature=0)
    assert "Paris" in done.choices[0].text
    assert done.choices[0].finish_reason == "length"
    assert done.usage.completion_tokens == 8
    assert done.usage.total_tokens == done.usage.prompt_tokens + 8


def test_a_chat_answers(client, base):
    done = client.chat.completions.create(model=base, messages=QUESTION, temperature=0)
    assert "Paris" in done.choices[0].message.content
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "stop"


def test_prompts_may_be_token_ids_and_lists_of_either(client, base):
    options = {"model": base, "max_tokens": 6, "temperature": 0}
    text = client.completions.create(prompt="The capital of", **options)
    ids = client.completions.create(prompt=[504, 3575, 282], **options)
    assert ids.choices[0].text == text.choices[0].text
    assert ids.usage.prompt_tokens == 3
    many = client.completions.create(prompt=["2 + 2 =", "The capital of"], n=2, **options)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in many.choices[2:]] == [text.choices[0].text] * 2
    lists = client.completions.create(prompt=[[504, 3575], [282]], **options)
    assert lists.usage.prompt_tokens == 3


def test_echo_gives_the_prompt_back(client, base):
    options = {"model": base, "max_tokens": 2, "temperature": 0, "echo": True}
    for prompt in ("The capital of", [504, 3575, 282]):
        text = client.completions.create(prompt=prompt, **options).choices[0].text
        assert text.startswith("The capital of")
        assert len(text) > len("The capital of")


@pytest.mark.parametrize("stop", [None, "Paris", [".", "\n"]])
def test_a_streamed_completion_is_the_whole_one_in_pieces(client, base, stop):
    options = {
        "model": base,
        "prompt": PROMPT,
        "max_tokens": 24,
        "temperature": 0,
        "stop": stop,
    }
    whole = client.completions.create(**options)
    chunks = list(
        client.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    )
    *content, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in content) == whole.choices[0].text
    reasons = [chunk.choices[0].finish_reason for chunk in content]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert not any(reasons[:-1])
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens


def test_a_streamed_chat_is_the_whole_one_in_pieces(client, base):
    options = {"model": base, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_stop_string_ends_the_text_before_it(client, base):
    options = {"model": base, "prompt": "1, 2, 3, 4, 5, 6,", "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**options).choices[0].text
    # Over a token boundary on purpose: digits, a comma and a space are tokens of their own.
    stop = free[5:9]
    stopped = client.completions.create(stop=stop, **options).choices[0]
    assert stopped.text == free[: free.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop


def test_a_stop_token_ends_the_text(client, base):
    options = {"model": base, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    stopped = client.completions.create(extra_body={"stop_token_ids": [PARIS]}, **options)
    assert "Paris" not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == PARIS


def test_logprobs_of_a_completion_are_of_its_tokens(client, base):
    done = client.completions.create(
        model=base, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3
    ).choices[0]
    logprobs = done.logprobs
    assert "".join(logprobs.tokens) == done.text
    places = zip(
        logprobs.text_offset,
        logprobs.tokens,
        logprobs.token_logprobs,
        logprobs.top_logprobs,
        strict=True,
    )
    for offset, token, value, top in places:
        assert done.text[offset:].startswith(token)
        assert len(top) == 3
        # Greedy: the chosen token is the most likely one.
        assert top[token] == value == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1.0 + 1e-6


def test_logprobs_of_a_chat_carry_bytes(client, base):
    done = client.chat.completions.create(
        model=base,
        messages=QUESTION,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    ).choices[0]
    raw = b"".join(bytes(entry.bytes) for entry in done.logprobs.content)
    assert raw.decode() == done.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in done.logprobs.content)


def test_n_choices_with_a_seed_are_different_and_repeatable(client, base):
    options = {
        "model": base,
        "prompt": "Once upon a time",
        "n": 4,
        "seed": 11,
        "temperature": 1.0,
        "max_tokens": 12,
    }
    first, again = (client.completions.create(**options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in again.choices]


def test_greedy_choices_are_the_same(client, base):
    done = client.completions.create(model=base, prompt=PROMPT, n=3, temperature=0, max_tokens=6)
    assert len({choice.text for choice in done.choices}) == 1


def test_logit_bias_forbids_a_token(client, base):
    options = {"model": base, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    assert client.completions.create(**options).choices[0].text == " Paris"
    forbidden = client.completions.create(logit_bias={str(PARIS): -100}, **options)
    assert forbidden.choices[0].text != " Paris"


def test_ignore_eos_fills_the_limit(client, base):
    done = client.chat.completions.create(
        model=base,
        messages=QUESTION,
        temperature=0,
        max_tokens=48,
        extra_body={"ignore_eos": True},
    )
    assert done.usage.completion_tokens == 48


def test_a_repeated_prompt_comes_from_the_cache(client, base):
    options = {"model": base, "prompt": "A long story about cats. " * 12, "max_tokens": 1}
    client.completions.create(**options)
    usage = client.completions.create(**options).usage
    assert usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens // 2


def test_text_beyond_ascii_survives_streaming(client, base):
    options = {
        "model": base,
        "messages": [{"role": "user", "content": "Repeat exactly: 你好 🙂 é"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = client.chat.completions.create(stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="Hi")
    assert caught.value.param == "model"
    assert "nobody" in caught.value.message


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "word " * 600}, "prompt"),
        ({"prompt": "Hi", "max_tokens": 600}, "max_tokens"),
        ({"prompt": "Hi", "temperature": 3}, "temperature"),
        ({"prompt": "Hi", "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"prompt": "Hi", "extra_body": {"tools": [{}]}}, "tools"),
    ],
)
def test_a_bad_request_names_its_field(client, base, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=base, **options)
    assert caught.value.param == param
    assert caught.value.type == "BadRequestError"


def test_a_prompt_over_the_window_is_refused_with_both_numbers(client, base):
    with pytest.raises(openai.BadRequestError, match=r"\b512\b") as caught:
        client.chat.completions.create(
            model=base, messages=[{"role": "user", "content": "word " * 600}]
        )
    assert "6" in caught.value.message


def test_probes_answer(server):
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
