"""The speed benchmark of KV formats and selections: what sequences hold, and a tiny run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kv_reader import Way
from benchmarks.kv_speed import Load, Outcome, Rounds, compare, show
from benchmarks.kv_stepping import Stepping
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.weights import Weights
from polydelta.kernels.ops import kernels_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Checkpoint) -> Decoder:
    kernels = kernels_for(torch.device("cpu"), torch.float32)
    weights = Weights(tiny_checkpoint.tensors, torch.float32, lambda *_: None)
    return Decoder(tiny_checkpoint.config, weights, kernels, 256, torch.float32)


def stepping(decoder: Decoder, way: Way) -> Stepping:
    return Stepping(decoder, way, torch.float32, longest=200, most_rows=2)


@pytest.mark.parametrize(
    "way",
    [
        Way(),
        Way("int8"),
        Way("int4", "quest:48"),
        Way(selection="window:4+40"),
        Way(selection="double-sparsity:16"),
        Way(selection="infllm:16+32+32"),
        Way(selection="snapkv:50"),
        Way(selection="h2o:0.2+0.2"),
    ],
    ids=lambda way: way.name,
)
def test_every_way_steps_from_a_context_that_was_never_computed(decoder: Decoder, way: Way) -> None:
    one = stepping(decoder, way)
    for rows in (1, 2):
        one.begin(rows, 200, 9)
        assert all(one.step() > 0 for _ in range(9))
        contexts = [sequence.num_computed for sequence in one._sequences]
        assert contexts == [200, 195][:rows]


def test_what_is_held_follows_the_format_and_the_selection(decoder: Decoder) -> None:
    held = {}
    for way in (Way(), Way("int8"), Way(selection="window:4+40"), Way(selection="snapkv:50")):
        one = stepping(decoder, way)
        one.begin(2, 200, 4)
        held[way.name] = one.held_bytes
    assert held["native"] > 1.5 * held["int8"]
    assert held["native"] > 2 * held["window:4+40"]
    assert held["native"] > 2 * held["snapkv:50"]


def test_the_decoder_stays_as_it_was(decoder: Decoder) -> None:
    before = [layer.mlp.down_proj for layer in decoder.layers]
    stepping(decoder, Way("int8"))
    assert [layer.mlp.down_proj for layer in decoder.layers] == before


def test_both_sides_take_turns_there_and_back() -> None:
    log = []

    class Fake:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def begin(self, *load: int) -> None:
            log.append((self.name, *load))

        def step(self) -> float:
            log.append(self.name)
            return self.seconds

    native, other = Fake("n", 2.0), Fake("o", 1.0)
    measured = compare(native, other, Load(64, 2, 1), rounds=2)  # type: ignore[arg-type]
    assert log == [("n", 2, 64, 6), "n", "n", ("o", 2, 64, 6), "o", "o", *"noonnoon"]
    assert measured.natives == [2.0, 2.0]
    assert measured.ratio == 0.5


def outcome(way: Way, ours: float, context: int, ratio: float = 1.0) -> Outcome:
    rounds = [Rounds(Load(context, 1, 1), [ours], [1.0])]
    return Outcome(way, 16, ratio, 1000, ratio - 0.1, rounds, 100, 1.0)


def test_selections_are_to_be_faster_from_4k_on_and_formats_to_hold_more() -> None:
    quest = Way(selection="quest:768")
    fast, slow = outcome(quest, 0.9, 4096), outcome(quest, 1.1, 8192)
    short, int4 = outcome(quest, 1.1, 1024), outcome(Way("int4"), 1.1, 8192, 3.55)
    judged = [one.faster(one.rounds[0]) for one in (fast, slow, short, int4)]
    assert judged == [True, False, None, None]
    assert fast.holds(1.0) is None
    told = int4.to_json()
    assert (told["bar"], told["page_met"], told["pool_met"]) == (3.5, True, False)
    cells = [list(column.cells) for column in show([int4], judged=True).columns]
    assert cells[-3:] == [["", "[green]3.55[/]"], ["", "[red]3.45[/]"], ["", "3.5"]]


@pytest.mark.slow
def test_it_runs_at_tiny_sizes(tmp_path: Path) -> None:
    result = tmp_path / "kv_speed.json"
    command = [sys.executable, "-m", "benchmarks.kv_speed", "--quick", "--output", str(result)]
    run = subprocess.run(
        [*command, "--only", "int4,snapkv,int8+window"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads(result.read_text())["ways"]
    assert [one["way"] for one in told] == ["int4", "snapkv:64", "int8, window:4+60"]
    assert all(len(one["loads"]) == 4 for one in told)
    assert told[0]["page_ratio"] == 3.5
