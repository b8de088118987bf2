"""From tokens to text that may be handed out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from polydelta.engine.detokenizer import Detokenizer, TextStep
from polydelta.engine.models.tokenizer import Tokenizer
from polydelta.engine.request import FinishReason, SamplingParams

FAMILY = "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}"


@dataclass
class Stream:
    """All that a request was given."""

    steps: list[TextStep]

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def end(self) -> tuple[FinishReason | None, str | int | None]:
        return self.steps[-1].finish_reason, self.steps[-1].stop_reason


def stream(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> Stream:
    """Pushes tokens until one ends the request."""
    detokenizer, steps = Detokenizer(tokenizer, params), []
    for token_id in ids:
        steps.append(detokenizer.push(token_id))
        if steps[-1].finish_reason:
            break
    return Stream(steps)


def tokens_of(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
    """Each piece encoded for itself, so that cuts fall where the test wants them."""
    return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]


def test_text_without_stops_is_handed_out_at_once(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, ["The capital of France is Paris."])
    steps = stream(tokenizer, ids, SamplingParams(max_tokens=100)).steps
    assert [step.text for step in steps] == [tokenizer.token_text(i) for i in ids]
    assert all(step.finish_reason is None for step in steps)


def test_the_last_token_that_there_is_room_for_ends_with_length(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, ["one two three four"])
    params = SamplingParams(max_tokens=100, stop=("three four",))
    detokenizer = Detokenizer(tokenizer, params)
    steps = [detokenizer.push(token_id, last=n == 2) for n, token_id in enumerate(ids[:3])]
    assert [step.finish_reason for step in steps] == [None, None, FinishReason.LENGTH]
    assert "".join(step.text for step in steps) == tokenizer.decode(ids[:3])
    end = tokenizer.eos_token_ids[0]
    assert Detokenizer(tokenizer, params).push(end, last=True).finish_reason is FinishReason.STOP


def test_max_tokens_ends_with_length_and_hands_out_everything(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, ["one two three four"])
    got = stream(tokenizer, ids, SamplingParams(max_tokens=3, stop=("three four",)))
    assert got.end == (FinishReason.LENGTH, None)
    assert got.text == tokenizer.decode(ids[:3])


def test_a_stop_string_over_several_tokens_is_not_leaked(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, ["answer", " 42", "\n", "\n", "Ques", "tion", ":", " more"])
    got = stream(tokenizer, ids, SamplingParams(max_tokens=99, stop=("\n\nQuestion:",)))
    assert got.text == "answer 42"
    assert got.end == (FinishReason.STOP, "\n\nQuestion:")
    assert len(got.steps) < len(ids)


def test_what_only_looked_like_a_stop_is_handed_out_later(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, ["a", "\n", "\n", "b", " c"])
    got = stream(tokenizer, ids, SamplingParams(max_tokens=99, stop=("\n\n\n",)))
    assert [step.text for step in got.steps] == ["a", "", "", "\n\nb", " c"]


def test_the_stop_string_is_kept_when_it_is_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, ["one", " END", "ING", " two"])
    params = SamplingParams(max_tokens=99, stop=("END",), include_stop_str_in_output=True)
    got = stream(tokenizer, ids, params)
    assert got.text == "one END"
    assert got.end == (FinishReason.STOP, "END")


def test_a_stop_string_inside_a_token_cuts_it(tokenizer: Tokenizer) -> None:
    [token_id] = tokenizer.encode(" information", add_special_tokens=False)
    got = stream(tokenizer, [token_id], SamplingParams(max_tokens=9, stop=("form",)))
    assert got.text == " in"


def test_of_two_stops_in_one_token_the_one_that_begins_first_ends_it(
    tokenizer: Tokenizer,
) -> None:
    [token_id] = tokenizer.encode(" information", add_special_tokens=False)
    got = stream(tokenizer, [token_id], SamplingParams(max_tokens=9, stop=("mat", "for")))
    assert got.text == " in"
    assert got.end == (FinishReason.STOP, "for")


def test_a_held_back_start_is_handed_out_when_the_answer_ends(tokenizer: Tokenizer) -> None:
    ids = [*tokens_of(tokenizer, ["x", "\n"]), tokenizer.eos_token_ids[0]]
    got = stream(tokenizer, ids, SamplingParams(max_tokens=99, stop=("\n\n",)))
    assert got.text == "x\n"
    assert got.end == (FinishReason.STOP, None)


@pytest.mark.parametrize("ends", ["length", "end of text"])
def test_a_stop_beside_a_character_that_was_never_completed_ends_the_answer(
    tokenizer: Tokenizer, ends: str
) -> None:
    first = tokenizer.encode(" \N{GRINNING FACE}", add_special_tokens=False)[0]
    assert tokenizer.decode([first]) == " \ufffd"
    ids = [first] if ends == "length" else [first, tokenizer.eos_token_ids[0]]
    got = stream(tokenizer, ids, SamplingParams(max_tokens=len(ids), stop=(" ",)))
    assert got.text == ""
    assert got.end == (FinishReason.STOP, " ")


@settings(deadline=None, max_examples=200)
@given(
    pieces=st.lists(st.text("ab c\n\N{GRINNING FACE}\u00e9", min_size=1, max_size=6), max_size=12),
    stops=st.lists(
        st.text("ab c\n\N{GRINNING FACE}\u00e9", min_size=1, max_size=4), min_size=1, max_size=3
    ),
    include=st.booleans(),
    max_tokens=st.integers(1, 60),
)
def test_however_a_text_is_cut_it_ends_at_the_first_stop(
    tokenizer: Tokenizer, pieces: list[str], stops: list[str], include: bool, max_tokens: int
) -> None:
    ids = tokens_of(tokenizer, pieces)[:max_tokens]
    params = SamplingParams(
        max_tokens=max_tokens, stop=stops, include_stop_str_in_output=include, ignore_eos=True
    )
    got = stream(tokenizer, ids, params)
    # The plain truth: the text after each token, looked through from its beginning.
    expected, reason = tokenizer.decode(ids), None
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        hits = [(text.find(stop), stop) for stop in stops if stop in text]
        if hits:
            place, stop = min(hits)
            expected, reason = text[: place + len(stop) * include], FinishReason.STOP
            break
    ended = got.steps[-1].finish_reason if got.steps else None
    if reason is None and len(ids) == max_tokens:
        reason = FinishReason.LENGTH
    assert ended == reason
    if reason is None:  # still running: something may be held back, but only a stop's beginning
        held = expected[len(got.text) :]
        assert expected.startswith(got.text)
        assert held.strip("\ufffd") == "" or any(stop.startswith(held) for stop in stops)
    else:
        assert got.text == expected


@pytest.mark.parametrize("text", ["\N{GRINNING FACE}", FAMILY, "\u2603\ufe0f", "\U00010348 g"])
def test_a_character_over_several_tokens_comes_out_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokens_of(tokenizer, ["a", text, "z"])
    assert len(ids) > len(text) + 2, "the character should be cut into several tokens"
    got = stream(tokenizer, ids, SamplingParams(max_tokens=99))
    assert got.text == f"a{text}z"
    assert all("\ufffd" not in step.text for step in got.steps)


def test_max_tokens_in_the_middle_of_a_character_hands_out_a_replacement(
    tokenizer: Tokenizer,
) -> None:
    ids = tokens_of(tokenizer, ["a", "\N{GRINNING FACE}"])
    for count in range(2, len(ids)):
        got = stream(tokenizer, ids, SamplingParams(max_tokens=count))
        assert got.end == (FinishReason.LENGTH, None)
        assert got.text == tokenizer.decode(ids[:count])
        assert got.text.strip("\ufffd") == "a"


def test_a_stop_string_of_a_character_over_several_tokens_is_found(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, ["ok ", "\N{GRINNING FACE}", "tail"])
    got = stream(tokenizer, ids, SamplingParams(max_tokens=99, stop=("\N{GRINNING FACE}",)))
    assert got.text == "ok "
    assert got.end == (FinishReason.STOP, "\N{GRINNING FACE}")


def test_eos_ends_the_answer_and_is_not_in_its_text(tokenizer: Tokenizer) -> None:
    ids = [*tokens_of(tokenizer, ["done"]), tokenizer.eos_token_ids[0]]
    got = stream(tokenizer, ids, SamplingParams(max_tokens=99, skip_special_tokens=False))
    assert got.text == "done"
    assert got.end == (FinishReason.STOP, None)


@pytest.mark.parametrize("skip", [True, False])
def test_ignored_eos_is_a_token_like_any_other(tokenizer: Tokenizer, skip: bool) -> None:
    eos = tokenizer.eos_token_ids[0]
    first, second = tokens_of(tokenizer, ["a"]), tokens_of(tokenizer, ["b"])
    params = SamplingParams(max_tokens=3, ignore_eos=True, skip_special_tokens=skip)
    got = stream(tokenizer, [*first, eos, *second], params)
    assert got.end == (FinishReason.LENGTH, None)
    assert got.text == ("ab" if skip else f"a{tokenizer.token_text(eos)}b")


def test_a_stop_token_id_ends_the_answer_and_says_which(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, ["a", " stop", " b"])
    got = stream(tokenizer, ids, SamplingParams(max_tokens=99, stop_token_ids=(ids[1],)))
    assert got.text == "a"
    assert got.end == (FinishReason.STOP, ids[1])


def test_a_stop_token_id_holds_even_where_eos_is_ignored(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_ids[0]
    params = SamplingParams(max_tokens=99, stop_token_ids=(eos,), ignore_eos=True)
    assert stream(tokenizer, [eos], params).end == (FinishReason.STOP, eos)


def test_a_stop_at_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, ["a", " b"])
    got = stream(tokenizer, ids, SamplingParams(max_tokens=2, stop=("b",)))
    assert got.end == (FinishReason.STOP, "b")
    assert got.text == "a "


def test_requests_do_not_share_what_they_hold_back(tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=99, stop=("\n\n",))
    [newline] = tokenizer.encode("\n", add_special_tokens=False)
    one, two = Detokenizer(tokenizer, params), Detokenizer(tokenizer, params)
    assert one.push(newline) == two.push(newline) == TextStep("")
    assert one.push(newline).finish_reason is FinishReason.STOP


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_tokens_at_all_give_the_text_of_all_of_them(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Parts of characters in orders that no text has, and special tokens, among them."""
    odd = tokens_of(tokenizer, ["\N{GRINNING FACE}\u00e9\u4e2d\U00010348\ufffd"])
    token = st.one_of(st.sampled_from(odd), st.integers(0, tokenizer.vocab_size - 1))
    ids = data.draw(st.lists(token, min_size=1, max_size=30))
    params = SamplingParams(
        max_tokens=len(ids), ignore_eos=True, skip_special_tokens=data.draw(st.booleans())
    )
    assert stream(tokenizer, ids, params).text == tokenizer.decode(ids, params.skip_special_tokens)
