"""What a server is refused to be, and what its requests may ask for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from polydelta.engine.config import EngineConfig
from polydelta.engine.kv_composition import Option, apart, names_of, row_of
from polydelta.engine.kv_setup import KVSetup, problem, requested
from polydelta.kernels.kv_selection import parse_prefill, parse_selection

# Has what any method may need.
RICH = KVSetup(host_kv=True, labels=True)


def setup_of(**options: object) -> KVSetup:
    config = EngineConfig(**options)
    return KVSetup.of(
        config, on_gpu=False, sliding_windows=False, max_batch_tokens=512, max_batch_size=64
    )


def refusal(**options: object) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        setup_of(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_config_says_what_is_stored_and_read() -> None:
    setup = setup_of(
        kv_format="int8",
        kv_select="double-sparsity:64",
        prefill="xattention:16+0.9",
        kv_labels=Path("labels"),
    )
    assert (setup.format, setup.selection, setup.prefill) == (
        "int8",
        parse_selection("double-sparsity:64"),
        parse_prefill("xattention:16+0.9"),
    )
    assert setup_of() == KVSetup()


def test_exactly_the_combinations_of_the_table_are_refused() -> None:
    for format_name, select, prefill in product(*map(names_of, Option)):
        setup = replace(
            RICH,
            format=format_name,
            selection=parse_selection(select),
            prefill=parse_prefill(prefill),
        )
        rows = [
            row_of(option, name)
            for option, name in zip(Option, (format_name, select, prefill), strict=True)
        ]
        excluded = any(apart(first, second) for first, second in product(rows, rows))
        assert (problem(setup) is not None) == excluded


def test_what_does_not_go_together_is_named_with_what_would() -> None:
    said = refusal(kv_format="kivi-4", kv_select="h2o:0.2+0.1")
    assert "kv_format kivi-4 does not go with kv_select h2o:0.2+0.1" in said
    assert "full, window, quest" in said
    assert "leave one of them out" in said
    said = refusal(kv_select="window:4+64", prefill="xattention")
    assert "kv_select window:4+64 does not go with prefill xattention:8+0.9, but with full" in said


def test_what_a_method_needs_is_named() -> None:
    assert "host_kv_gib" in refusal(kv_select="infllm")
    assert setup_of(kv_select="infllm", host_kv_bytes=1).host_kv
    said = refusal(kv_select="double-sparsity")
    assert "kv_labels" in said
    assert "polydelta calibrate" in said


def test_labels_that_nothing_reads_are_refused() -> None:
    said = refusal(kv_select="quest", kv_labels=Path("some/labels"))
    assert "kv_labels some/labels is not read with kv_select quest:1024" in said
    assert "leave it out, or use kv_select double-sparsity" in said


def test_blocks_in_host_ram_are_read_on_cpus_only() -> None:
    infllm = replace(RICH, selection=parse_selection("infllm"))
    assert problem(infllm) is None
    assert "device cpu" in str(problem(replace(infllm, on_gpu=True)))
    assert problem(replace(RICH, selection=parse_selection("quest"), on_gpu=True)) is None


@pytest.mark.parametrize("name", names_of(Option.SELECT))
def test_models_with_sliding_windows_are_read_in_full(name: str) -> None:
    setup = replace(RICH, selection=parse_selection(name), sliding_windows=True)
    said = problem(setup)
    assert (said is None) == (name == "full")
    assert said is None or f"leave out {Option.SELECT}" in said


@pytest.mark.parametrize(
    ("option", "name", "least"),
    [("selection", "snapkv", 37), ("selection", "h2o", 37), ("prefill", "xattention", 133)],
)
def test_a_step_has_room_for_what_is_computed_at_once(option: str, name: str, least: int) -> None:
    parse = parse_prefill if option == "prefill" else parse_selection
    setup = replace(RICH, max_batch_size=6, **{option: parse(name)})
    assert problem(replace(setup, max_batch_tokens=least)) is None
    said = problem(replace(setup, max_batch_tokens=least - 1))
    assert said is not None
    assert f"max_batch_tokens {least - 1}" in said
    assert f"raise it to {least}" in said


def test_requests_may_ask_for_what_needs_no_notes_in_pages() -> None:
    for text in ("full", "window:2+30", "snapkv:64", "h2o"):
        assert requested(KVSetup(), text) == parse_selection(text)


@pytest.mark.parametrize("name", ["quest", "double-sparsity"])
def test_what_needs_notes_is_asked_for_where_pages_have_them(name: str) -> None:
    own = replace(RICH, selection=parse_selection(f"{name}:512"))
    assert requested(own, f"{name}:7") == parse_selection(f"{name}:7")
    with pytest.raises(ValueError, match=f"'{name}:7' does not go with") as caught:
        requested(RICH, f"{name}:7")
    assert (
        "ask for one of full, window[:SINKS+RECENT], snapkv[:TOKENS], h2o[:HEAVY+RECENT]."
        in str(caught.value)
    )


def test_a_selection_that_there_is_not_is_refused_with_those_that_a_request_may_ask_for() -> None:
    with pytest.raises(ValueError, match="'windows:4' is not known") as caught:
        requested(KVSetup("gear"), "windows:4")
    assert str(caught.value).endswith("one of full, window[:SINKS+RECENT], snapkv[:TOKENS].")


def test_what_the_server_reads_by_itself_may_always_be_asked_for() -> None:
    own = replace(RICH, selection=parse_selection("infllm:1+32+16"))
    assert requested(own, "infllm:1+32+16") == own.selection
    with pytest.raises(ValueError, match="'infllm:1\\+64\\+16' does not go with") as caught:
        requested(own, "infllm:1+64+16")
    assert (
        "one of full, window[:SINKS+RECENT], infllm:1+32+16, snapkv[:TOKENS], h2o[:HEAVY+RECENT]."
        in str(caught.value)
    )
    own = replace(RICH, selection=parse_selection("quest:96"))
    with pytest.raises(ValueError, match="quest:96") as caught:
        requested(own, "infllm:1+64+16")
    assert ", quest[:TOKENS], " in str(caught.value)


def test_a_request_is_refused_what_the_server_s_format_or_prefill_does_not_go_with() -> None:
    with pytest.raises(ValueError, match="kv_format gear") as caught:
        requested(KVSetup("gear"), "h2o")
    assert "one of full, window[:SINKS+RECENT], snapkv[:TOKENS]." in str(caught.value)
    with pytest.raises(ValueError, match="prefill xattention"):
        requested(KVSetup(prefill=parse_prefill("xattention")), "window")


def test_a_request_is_refused_what_the_model_does_not_go_with() -> None:
    with pytest.raises(ValueError, match="one of full"):
        requested(KVSetup(sliding_windows=True), "window")
