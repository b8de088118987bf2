"""`polydelta calibrate`: a file of labels, and what says why there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polydelta.engine.kv_labels import read_labels
from polydelta.engine.models.checkpoint import open_checkpoint

Polydelta = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        " ".join(f"In week {week} it rained for {week % 7} days." for week in range(90))
    )
    return path


def test_labels_of_a_model_are_written_and_told(
    polydelta: Polydelta, tiny_folder: Path, tmp_path: Path, text: Path, facts: Callable
) -> None:
    out = tmp_path / "labels.json"
    code, said, err = polydelta("calibrate", text, "--out", out, "--model", tiny_folder)
    assert code == 0, err
    told = facts(said)
    assert told["file"] == str(out)
    assert int(told["tokens"].replace(",", "")) >= 512
    model = open_checkpoint(str(tiny_folder))
    labels = read_labels(out, model.config, model.id)
    assert labels.shape == (
        model.config.num_layers, model.config.num_kv_heads, model.config.head_dim // 4,
    )  # fmt: skip
    call = f"polydelta serve --kv-select double-sparsity --kv-labels {out} --model {tiny_folder}"
    assert err.endswith(f"{call}\n")


def test_a_server_reads_by_the_labels(
    polydelta: Polydelta, tiny_folder: Path, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "labels.json"
    assert polydelta("calibrate", text, "-o", out, "--model", tiny_folder)[0] == 0
    arguments = ("generate", "Once upon a time", "--raw", "--max-tokens", "3")
    code, said, err = polydelta(
        *arguments, "--model", tiny_folder, "--kv-select=double-sparsity:2", "--kv-labels", out
    )
    assert code == 0, err
    assert said.strip()


def test_what_cannot_be_read_or_written_is_one_line(
    polydelta: Polydelta, tiny_folder: Path, tmp_path: Path, text: Path
) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("too little")
    binary.write_bytes(b"\xff\xfe\x00")
    model = ("--model", tiny_folder)
    for arguments, reason in (
        ((tmp_path / "nothing", *model), "nothing"),
        ((binary, *model), "UTF-8"),
        ((short, *model, "--out", tmp_path / "labels"), "at least"),
        ((text, *model, "--out", tmp_path / "no" / "folder"), "--out"),
        ((text, *model, "--out", tmp_path), "--out"),
    ):
        code, _, err = polydelta("calibrate", *arguments)
        assert code == 1
        assert err.startswith("Error: ")
        assert reason in err
        assert err.count("\n") == 1
