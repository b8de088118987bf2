"""The table of what composes: complete, of one mind with the code, and without contradictions."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from polydelta.engine.kv_composition import (
    ROWS,
    Option,
    Shared,
    apart,
    check_method,
    in_full,
    names_of,
    not_with,
    row_of,
)
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.sequence import Sequence
from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_selection import (
    PREFILLS,
    SELECTIONS,
    XAttention,
    parse_prefill,
    parse_selection,
)

PROMPT = 300


def sequence_of(selection: str) -> Sequence:
    request = GenerationRequest(
        "a", range(PROMPT), SamplingParams(), kv_select=parse_selection(selection)
    )
    return Sequence(request, lambda _: None)


def test_every_method_that_there_is_has_one_row() -> None:
    assert sorted(names_of(Option.FORMAT)) == sorted(FORMATS)
    assert names_of(Option.SELECT) == list(SELECTIONS)
    assert names_of(Option.PREFILL) == list(PREFILLS)


def test_formats_of_a_row_encode_alike() -> None:
    for row in ROWS:
        if row.option is Option.FORMAT:
            formats = [FORMATS[name]() for name in row.names]
            assert len({(each.by_page, each.rotates_keys) for each in formats}) == 1


def test_labels_are_of_channels_that_no_format_rotates() -> None:
    refused = not_with(row_of(Option.SELECT, "double-sparsity"))
    assert refused == [name for name, format in FORMATS.items() if format().rotates_keys]


def test_no_two_methods_of_one_option_exclude_each_other() -> None:
    for first, second in product(ROWS, ROWS):
        assert apart(first, second) == apart(second, first)
        assert not (first.option is second.option and apart(first, second))


def test_what_is_left_out_goes_with_everything() -> None:
    defaults = ((Option.FORMAT, "native"), (Option.SELECT, "full"), (Option.PREFILL, "full"))
    for option, name in defaults:
        row = row_of(option, name)
        # A row of several formats names what any of them does not go with.
        assert not_with(row) == []
        assert (row.limits, row.prompt_step) == ("", 1)


def test_what_does_not_go_together_is_told_from_both_sides() -> None:
    assert "xattention" in not_with(row_of(Option.SELECT, "window"))
    assert "window" in not_with(row_of(Option.PREFILL, "xattention"))
    assert "h2o" in not_with(row_of(Option.FORMAT, "gear"))
    assert "gear" in not_with(row_of(Option.SELECT, "h2o"))
    assert "snapkv" not in not_with(row_of(Option.FORMAT, "gear"))


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_prefix_cache_gets_what_the_table_says(name: str) -> None:
    published = KVRules().num_publishable(sequence_of(name))
    shared = row_of(Option.SELECT, name).prefix_caching
    assert shared is {0: Shared.NOTHING, PROMPT: Shared.PROMPT_PAGES}.get(published, Shared.PAGES)


def test_of_a_chosen_prefill_the_prefix_cache_gets_whole_blocks() -> None:
    rules = KVRules(prefill=XAttention())
    assert row_of(Option.PREFILL, "xattention").prefix_caching is Shared.PROMPT_BLOCKS
    assert rules.num_publishable(sequence_of("full")) == 256


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_prompt_waits_only_for_as_many_tokens_as_the_table_says(name: str) -> None:
    row, rules = row_of(Option.SELECT, name), KVRules()
    sequence = sequence_of(name)
    sequence.num_computed = PROMPT - row.prompt_step
    assert rules.next_chunk(sequence, row.prompt_step) == row.prompt_step
    if row.prompt_step > 1:
        assert rules.next_chunk(sequence, row.prompt_step - 1) == 0


def test_methods_are_written_in_full_as_they_are_read() -> None:
    for name in SELECTIONS:
        assert str(parse_selection(in_full(name))) == in_full(name)
    assert str(parse_prefill(in_full("xattention"))) == "xattention:8+0.9"
    assert in_full("int8") == "int8"


@pytest.mark.parametrize(
    ("option", "text", "there_is"),
    [
        (Option.FORMAT, "int9", "mustafar-50"),
        (Option.SELECT, "int8", "window[:SINKS+RECENT]"),
        (Option.SELECT, "xattention", "quest[:TOKENS]"),
        (Option.PREFILL, "quest", "xattention[:STRIDE+THRESHOLD]"),
    ],
)
def test_a_method_that_there_is_not_is_refused_with_those_that_there_are(
    option: Option, text: str, there_is: str
) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        check_method(option, text)
    assert there_is in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "xattention:",
        "xattention:8",
        "xattention:7+0.9",
        "xattention:8+0",
        "xattention:8+1.5",
        "xattention:8+0.9+1",
    ],
)
def test_a_prefill_with_wrong_numbers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="prefill 'xattention"):
        check_method(Option.PREFILL, text)


def test_the_table_imports_no_torch() -> None:
    program = "import sys, polydelta.engine.kv_setup; print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "False"
