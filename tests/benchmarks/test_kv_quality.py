"""The quality benchmark of KV formats and selections: what it reads, what it makes of it, and a run
at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
import typer

from benchmarks.kv_measuring import Outcome
from benchmarks.kv_quality_plot import Point, draw, save
from benchmarks.kv_quality_tables import cost_table, retrieval_table
from benchmarks.kv_reader import Way
from benchmarks.kv_retrieval import LINES, MULTI_KEY, NEEDLE, Score, haystacks
from benchmarks.kv_texts import Text
from benchmarks.kv_ways import NATIVE, bytes_read, key, named, read_share, token_bytes, ways
from benchmarks.plot_labels import CHARACTER, LINE, Box, places
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_selection import SELECTIONS, parse_selection

ROOT = Path(__file__).parents[2]
DTYPE = torch.bfloat16


@pytest.fixture(scope="module")
def text(default_checkpoint: Checkpoint) -> Text:
    return Text.read(default_checkpoint.tokenizer)


def spec(checkpoint: Checkpoint, format: str = "native", selection: str = "full") -> KVSpec:
    return KVSpec.of(checkpoint.config, DTYPE, 16, format, parse_selection(selection))


def outcome(way: Way, *losses: float) -> Outcome:
    return Outcome(way, 16, 100.0, 0.5, list(losses), counted=9, compared=3)


def test_every_format_and_selection_is_there_and_native_full_attention_comes_first() -> None:
    each = ways(4096, 2048)
    assert each[0] == NATIVE
    assert {way.format for way in each} == set(FORMATS)
    assert {way.selection.partition(":")[0] for way in each} == set(SELECTIONS)
    assert [way.prefill for way in each if way.prefill != "full"] == ["xattention"]
    assert len({key(way) for way in each}) == len(each)


def test_ways_are_named_without_their_numbers() -> None:
    chosen = named(ways(4096, 2048), "quest, int4+quest")
    assert [way.name for way in chosen] == ["native", "quest:768", "int4, quest:768"]
    with pytest.raises(typer.BadParameter, match="'qest' is not one of native, int8"):
        named(ways(4096, 2048), "qest")


def test_the_text_is_long_enough_and_calibration_reads_none_of_what_is_measured(text: Text) -> None:
    assert len(text.measured) > 50_000
    windows = text.windows(13, 4096)
    assert [token for window in windows for token in window] == text.ids[: 13 * 4096]
    assert [*text.measured, *text.for_calibration] == text.ids
    with pytest.raises(ValueError, match="windows of 4096 tokens, not 99"):
        text.windows(99, 4096)


def test_a_haystack_has_its_keys_at_their_depths_and_asks_for_them(
    text: Text, default_checkpoint: Checkpoint
) -> None:
    tokenizer = default_checkpoint.tokenizer
    made = haystacks(tokenizer, text.measured, [600, 4096], [0.1, 0.5, 0.9])
    tasks = [(one.task, one.length) for one in made]
    assert tasks == [(NEEDLE, 600)] * 3 + [(MULTI_KEY, 600), (NEEDLE, 4096), (MULTI_KEY, 4096)]
    for one in made:
        assert len(one.tokens) == one.length
        hidden = tokenizer.decode(one.tokens[: one.prompt])
        facts = hidden.split("The special number of ")[1:]
        assert len(facts) == (1 if one.task == NEEDLE else LINES)
        assert len({fact.split()[0] for fact in facts}) == len(facts)
        for answer in one.answers:
            number = tokenizer.decode([one.tokens[at] for at in answer])
            asked = tokenizer.decode(one.tokens[one.prompt : answer.stop])
            name = asked.split("The special number of ")[-1].split()[0]
            assert f"The special number of {name} is {number}." in hidden
            assert answer.start > one.prompt
    shallow, middle, deep = (tokenizer.decode(one.tokens).index("special") for one in made[:3])
    assert shallow < middle < deep


def test_a_text_without_room_for_its_keys_is_refused(
    text: Text, default_checkpoint: Checkpoint
) -> None:
    with pytest.raises(ValueError, match="40 tokens have no room for 8 lines"):
        haystacks(default_checkpoint.tokenizer, text.measured, [40], [0.5])


def test_scores_count_digits_and_whole_keys() -> None:
    score = Score()
    score.add([True, True, False])
    total = Score(2, 2, 1, 1)
    total += score
    assert (total.digits, total.right_digits, total.keys, total.right_keys) == (5, 4, 2, 1)
    assert total.digits_share == 0.8
    assert total.keys_share == 0.5


def test_the_cost_is_of_the_same_windows_and_its_error_from_one_to_the_next() -> None:
    native = outcome(NATIVE, 2.0, 3.0, 9.0)
    cost, error = outcome(Way("int4"), 2.02, 3.04).cost(native)
    assert cost == pytest.approx(0.030455, rel=1e-4)
    assert error == pytest.approx(0.010305, rel=1e-4)
    assert outcome(Way("int4"), 2.02).cost(native)[1] is None


def test_bars_are_for_pure_ways() -> None:
    native = outcome(NATIVE, 2.0)
    judged = {
        way.name: outcome(way, 2.01).met(native)
        for way in (Way("int8"), Way("int4"), Way(selection="quest:9"), Way("int4", "quest:9"))
    }
    assert judged == {"int8": False, "int4": True, "quest:9": True, "int4, quest:9": None}


def test_bytes_read_are_those_of_the_format_and_of_what_is_chosen(
    default_checkpoint: Checkpoint,
) -> None:
    model = default_checkpoint.config
    native, int4 = spec(default_checkpoint), spec(default_checkpoint, "int4")
    assert token_bytes(native) == 2 * model.kv_size * 2
    assert token_bytes(int4) == 2 * model.num_kv_heads * (32 + 4)
    full = parse_selection("full")
    assert read_share(native, full, 100, range(100, 200)) == 1
    # One page that is not full yet, and four that are.
    size = int4.block_size
    expected = 4 * size * token_bytes(int4) + 7 * token_bytes(native)
    assert bytes_read(int4, full, 9, 4 * size + 7) == model.num_layers * expected


@pytest.mark.parametrize(
    ("selection", "least", "most"),
    [
        ("window:4+1020", 0.249, 0.251),
        # Two of thirty layers in full, and two rows of bounds for every page of 15.
        ("quest:1024", 0.36, 0.37),
        ("double-sparsity:256", 0.18, 0.20),
        # Four keys of every page that may be chosen.
        ("infllm:128+512+384", 0.36, 0.37),
        # What came behind the prompt stays.
        ("snapkv:1024", 0.74, 0.76),
        ("h2o:0.2+0.2", 0.19, 0.21),
    ],
)
def test_selections_read_a_part(
    default_checkpoint: Checkpoint, selection: str, least: float, most: float
) -> None:
    of = spec(default_checkpoint, "native", selection)
    share = read_share(of, parse_selection(selection), 2048, [4096])
    assert least < share < most


def test_names_lie_on_no_other_and_on_no_point() -> None:
    random = Random(5)
    points = [(random.uniform(0, 300), random.uniform(0, 150)) for _ in range(17)]
    names = [f"a name {'x' * (number % 9)}" for number in range(17)]
    placed = places(points, names, 7.5, 300.0)
    boxes = [
        Box(left, middle - LINE * 7.5 / 2, left + CHARACTER * 7.5 * len(name), middle)
        for name, (left, middle) in zip(names, placed, strict=True)
    ]
    assert all(box.left >= 0 and box.right <= 300 for box in boxes)
    for number, box in enumerate(boxes):
        assert not any(box.meets(other) for other in boxes[:number])
        assert not any(box.meets(Box(x, y, x, y)) for x, y in points)


def test_the_plot_names_every_way_and_model(tmp_path: Path) -> None:
    each = [
        Point("int8", 0.5, -0.001, 0.002, is_format=True, is_selection=False),
        Point("quest:768", 0.3, 0.6, 0.1, is_format=False, is_selection=True),
    ]
    save(draw({"base": each, "with some": each[:1]}, [0.005, 0.02]), tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(name in drawn for name in ("int8", "quest:768", "base", "with some"))
    save(draw({"base": each}, ()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_tables_have_a_row_for_each_way_and_say_what_is_met() -> None:
    each = [outcome(NATIVE, 2.0, 3.0), outcome(Way("int8"), 2.5, 3.5), outcome(Way("int4"), 2.0)]
    for one in each:
        one.scores[NEEDLE, 512].add([True, False])
    table = cost_table("model", each, judged=True)
    assert list(table.columns[0].cells) == ["native", "int8", "int4"]
    bars = next(list(column.cells) for column in table.columns if column.header == "bar")
    assert bars == ["", "[red]0.5% missed[/]", "[green]3.0% met[/]"]
    found = retrieval_table("model", each)
    assert [list(column.cells) for column in found.columns][1] == ["50"] * 3


@pytest.mark.slow
def test_it_runs_at_tiny_sizes(tmp_path: Path) -> None:
    result = tmp_path / "kv_quality.json"
    command = [sys.executable, "-m", "benchmarks.kv_quality", "--quick", "--output", str(result)]
    chosen = "int8,h2o,xattention,int4+quest"
    run = subprocess.run(
        [*command, "--only", chosen], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "PSF-2.0: 112,955 tokens" in run.stdout.replace("\n", " ")
    told = json.loads(result.read_text())
    base, adapter = told["models"].values()
    assert len(base) == len(adapter) == 5
    native, int8 = base[:2]
    assert native["kl_divergence"] == 0
    assert native["same_argmax"] == 1
    assert abs(int8["cost"]) < 0.02
    assert int8["kl_divergence"] < 0.01
    assert int8["read_share"] == pytest.approx(0.516, abs=0.001)
    # The adapter acts.
    assert adapter[0]["window_losses"][0] != native["window_losses"][0]
    assert result.with_suffix(".svg").exists()
