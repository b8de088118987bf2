"""`/v1/completions`, whole bodies."""

from __future__ import annotations


def test_a_completion_has_openai_s_shape(complete):
    body = complete(prompt="Hi", max_tokens=10)
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "fake-base"
    assert body["created"] > 0
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Hello",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_prompt_of_token_ids_goes_to_the_engine_as_it_is(complete, engine):
    complete(prompt=[1, 2, 299])
    assert [tuple(r.prompt_token_ids) for r in engine.requests] == [(1, 2, 299)]


def test_lists_of_prompts_give_choices_prompt_by_prompt(complete, engine):
    engine.answer = lambda request: bytes(request.prompt_token_ids).decode()
    body = complete(prompt=["ab", "cd"], n=2)
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, "ab"),
        (1, "ab"),
        (2, "cd"),
        (3, "cd"),
    ]
    # A prompt counts once, however many choices it has.
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 8


def test_lists_of_token_id_lists_are_prompts(complete, engine):
    complete(prompt=[[1, 2], [3]])
    assert [tuple(r.prompt_token_ids) for r in engine.requests] == [(1, 2), (3,)]


def test_max_tokens_is_16_when_left_open(complete, engine):
    engine.answer = lambda _: "y" * 40
    body = complete()
    assert body["choices"][0]["text"] == "y" * 16
    assert body["choices"][0]["finish_reason"] == "length"


def test_max_tokens_left_open_shrinks_to_the_room_in_the_window(complete, engine):
    complete(prompt="p" * 60)
    assert engine.requests[0].sampling.max_tokens == 4


def test_echo_puts_the_prompt_before_the_text(complete):
    assert complete(prompt="Hi ", echo=True)["choices"][0]["text"] == "Hi Hello"


def test_echo_of_token_ids_is_their_text(complete):
    body = complete(prompt=[list(b"A "), list(b"B ")], echo=True)
    assert [c["text"] for c in body["choices"]] == ["A Hello", "B Hello"]


def test_logprobs_are_four_lists_that_always_hold_the_chosen_token(complete):
    logprobs = complete(logprobs=1)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "e", "l", "l", "o"]
    assert logprobs["token_logprobs"] == [-1.5] * 5
    assert logprobs["top_logprobs"][0] == {"I": -0.25, "H": -1.5}
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]


def test_logprobs_of_zero_reports_the_chosen_token_only(complete):
    logprobs = complete(logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {"H": -1.5}


def test_a_probability_of_zero_is_a_number_that_json_has(complete):
    top = complete(logprobs=3)["choices"][0]["logprobs"]["top_logprobs"][0]
    assert top["J"] == -9999.0


def test_tokens_that_are_part_of_a_character_show_their_bytes(complete, engine):
    engine.answer = lambda _: "é!"
    logprobs = complete(logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["text_offset"] == [0, 0, 1]


def test_sampling_fields_reach_the_engine(complete, engine):
    complete(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=7,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"5": -100, "299": 1.5},
        stop="end",
        stop_token_ids=[3],
        ignore_eos=True,
    )
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.min_p, sampling.seed, sampling.ignore_eos) == (0.1, 7, True)
    assert sampling.repetition_penalty == 1.1
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 2)
    assert sampling.logit_bias == {5: -100, 299: 1.5}
    assert (sampling.stop, sampling.stop_token_ids) == (("end",), (3,))


def test_priority_and_salt_reach_the_engine_with_every_choice(complete, engine):
    complete(prompt=["a", "b"], n=2, priority=-3, cache_salt="näher")
    complete()
    complete(priority=None, cache_salt=None)
    said = [(request.priority, request.cache_salt) for request in engine.requests]
    assert said == [(-3, "näher")] * 4 + [(0, "")] * 2


def test_choices_have_seeds_of_their_own(complete, engine):
    complete(seed=2**63 - 1, n=2)
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds == [2**63 - 1, -(2**63)]


def test_an_adapter_is_named_by_the_model_field(complete, engine):
    assert complete(model="dates")["model"] == "dates"
    complete(model="labels@1")
    assert [request.adapters[0].ref.name for request in engine.requests] == ["dates@1", "labels@1"]


def test_the_base_model_has_no_adapter(complete, engine):
    complete()
    assert engine.requests[0].adapters == ()


def test_cached_tokens_are_those_of_the_first_choice_of_each_prompt(complete, engine):
    engine.cached_tokens = 2
    usage = complete(prompt=["abc", "abd"], n=3)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


def test_null_is_the_same_as_left_out(complete):
    complete(max_tokens=None, stop=None, seed=None, logprobs=None, user=None, suffix=None)


def test_fields_that_change_nothing_are_taken(complete):
    complete(user="me", metadata={"a": "b"}, store=False, best_of=1)


def test_long_prompts_are_tokenised_in_a_thread(complete, engine):
    engine.max_model_len = 10_000
    complete(prompt="p" * 8000)
    assert len(engine.requests[0].prompt_token_ids) == 8000
