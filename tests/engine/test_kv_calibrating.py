"""Label channels of a tiny model, against the same sums over what transformers computes, and the
file that they are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from polydelta.engine import kv_calibrating
from polydelta.engine.kv_calibrating import WINDOW, calibrate, calibrate_model
from polydelta.engine.kv_labels import Labels, read_labels
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import Decoder, base_layout
from polydelta.engine.models.weights import Weights
from polydelta.kernels.kv_calibration import ChannelScores
from polydelta.kernels.ops import kernels_for

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Checkpoint) -> Decoder:
    weights = Weights(tiny_checkpoint.tensors, torch.float32, lambda *_: None)
    kernels = kernels_for(CPU, torch.float32)
    return Decoder(tiny_checkpoint.config, weights, kernels, WINDOW, torch.float32)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 49152, (WINDOW + 77,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def labels(decoder: Decoder, tokens: Tensor, tiny_checkpoint: Checkpoint) -> Labels:
    config = tiny_checkpoint.config
    fingerprint = base_layout(config, "tiny").fingerprint
    channels = calibrate(decoder, tokens, torch.float32)
    return Labels("tiny", fingerprint, "random tokens", len(tokens), channels)


@pytest.fixture
def file(labels: Labels, tmp_path: Path) -> Path:
    labels.write(tmp_path / "labels.json")
    return tmp_path / "labels.json"


@pytest.fixture
def edit(file: Path) -> Callable[..., None]:
    def write(**fields: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return write


def test_scores_of_a_kv_head_are_those_of_its_query_heads_whatever_their_sign() -> None:
    scores = ChannelScores(2, 1, 8, CPU)
    keys = torch.tensor([[[1.0, 2, 3, 4, 0, 0, 0, 0]]])
    queries = torch.tensor([[[-9.0, 1, 1, 1, 0, 0, 0, 0], [0, 1, -2, 1, 5, 0, 0, 0]]])
    scores.add(1, queries, keys)
    # 9, 4, 9, 8; the layer that was given nothing has ties only.
    assert scores.labels(4).tolist() == [[[0, 1]], [[0, 2]]]
    scores.add(1, -queries[:, :, [1, 0, 2, 3, 4, 5, 6, 7]], keys)
    assert scores.labels(8).tolist() == [[[0]], [[1]]]


def test_labels_are_the_channels_that_add_most_to_scores(
    labels: Labels, tokens: Tensor, tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotate, rotated = modeling_llama.apply_rotary_pos_emb, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        rotated.append(rotate(*args, **kwargs))
        return rotated[-1]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", recorded)
    sums = torch.zeros(3, 2, 10, dtype=torch.float64)
    for window in (tokens[:WINDOW], tokens[WINDOW:]):
        rotated.clear()
        with torch.no_grad():
            tiny_model(window[None])
        assert len(rotated) == 3
        for layer, (queries, keys) in enumerate(rotated):
            for head in range(6):
                products = queries[0, head].double() * keys[0, head // 3].double()
                sums[layer, head // 3] += products.abs().sum(0)
    expected = sums.topk(2).indices.sort().values
    assert torch.equal(labels.channels, expected)


def test_windows_are_reported_as_they_are_read(decoder: Decoder, tokens: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    calibrate(decoder, tokens, torch.float32, lambda *both: seen.append(both))
    assert seen == [(WINDOW, WINDOW + 77), (WINDOW + 77, WINDOW + 77)]


def test_a_text_that_says_little_is_refused(decoder: Decoder, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"has 511 tokens.*give at least 512"):
        calibrate(decoder, tokens[: WINDOW - 1], torch.float32)


def test_a_model_is_named_and_its_labels_come(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_calibrating, "open_checkpoint", lambda model: tiny_checkpoint)
    monkeypatch.setattr(kv_calibrating, "MOST_TOKENS", 600)
    own = calibrate_model(None, "cpu", "float32")
    given = calibrate_model(None, "cpu", "float32", "A text with these words. " * 200)
    assert own.model == "tiny"
    assert own.fingerprint == base_layout(tiny_checkpoint.config, "tiny").fingerprint
    assert (own.tokens, given.tokens) == (600, 600)
    assert "pydoc_data" in own.text
    assert "pydoc_data" not in given.text
    assert own.channels.shape == given.channels.shape == (3, 2, 2)


def test_what_is_written_is_read(labels: Labels, file: Path, tiny_checkpoint: Checkpoint) -> None:
    channels = read_labels(file, tiny_checkpoint.config, "tiny")
    assert channels.dtype == torch.int64
    assert torch.equal(channels, labels.channels)


def test_another_models_labels_are_refused(file: Path, tiny_checkpoint: Checkpoint) -> None:
    config = tiny_checkpoint.config
    with pytest.raises(ValueError, match=r"of model 'tiny', but 'other' has .*polydelta calibrate"):
        read_labels(file, config, "other")
    with pytest.raises(ValueError, match="each model, of each name and shape"):
        read_labels(file, replace(config, num_layers=4), "tiny")


@pytest.mark.parametrize(
    "channels",
    [
        None,
        "all",
        [[[0, 1]]],
        [[[0, 1]] * 2] * 2,
        [[[0, 1, 2]] * 2] * 3,
        [[[0, 10]] * 2] * 3,
        [[[-1, 3]] * 2] * 3,
        [[[4, 4]] * 2] * 3,
        [[[0, 1], [2]]] * 3,
        [[[0, 1 << 70]] * 2] * 3,
        [[[0, 1 << 63]] * 2] * 3,
        [[[0.0, 1.5]] * 2] * 3,
        [[[False, True]] * 2] * 3,
    ],
)
def test_channels_that_the_model_does_not_have_are_refused(
    file: Path, edit: Callable[..., None], tiny_checkpoint: Checkpoint, channels: Any
) -> None:
    edit(channels=channels)
    message = (
        "channels must be, for each of 3 layers and 2 kv heads, 2 ascending numbers from 0 to 9"
    )
    with pytest.raises(ValueError, match=message):
        read_labels(file, tiny_checkpoint.config, "tiny")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "has polydelta_labels None, not 1"),
        (b"7", "has polydelta_labels None, not 1"),
        (b'{"tokens": 3}', "has polydelta_labels None, not 1"),
    ],
)
def test_a_file_of_something_else_is_refused(
    file: Path, tiny_checkpoint: Checkpoint, content: bytes, problem: str
) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{problem}.*polydelta calibrate"):
        read_labels(file, tiny_checkpoint.config, "tiny")


def test_a_file_that_is_not_there_is_named(tmp_path: Path, tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be opened \(No such file"):
        read_labels(tmp_path / "none.json", tiny_checkpoint.config, "tiny")
