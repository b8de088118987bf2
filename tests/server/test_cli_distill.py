"""`polydelta adapters distill-delta`, with models in folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import OneBit, TokenRows
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE, AdapterRef
from polydelta.engine.models.base_weights import checkpoint_layout
from polydelta.engine.models.checkpoint import open_checkpoint

Run = Callable[..., tuple[int, str, str]]
Facts = Callable[[str], dict[str, str]]

EMBEDDING = "base_model.model.model.embed_tokens.weight"


@pytest.fixture
def run(polydelta: Run) -> Run:
    """Runs `polydelta adapters distill-delta ...`; (exit code, stdout, stderr)."""
    return partial(polydelta, "adapters", "distill-delta")


@pytest.fixture
def tuned(tiny_model: LlamaForCausalLM, save_model: Callable, tmp_path: Path) -> Path:
    """All but the norms have moved, and of the embedding two rows."""
    torch.manual_seed(9)
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.model.embed_tokens.weight[[5, 70]] += 0.5
    return save_model(model, tmp_path / "tuned")


def test_a_full_fine_tune_becomes_an_adapter(
    run: Run, facts: Facts, tiny_folder: Path, tuned: Path, tmp_path: Path
) -> None:
    code, told, err = run(tiny_folder, tuned, tmp_path / "out", "--dtype", "float32")
    assert code == 0, err
    shown = facts(told)
    assert shown["linear layers"] == "21"
    assert shown["kept whole"] == "embed_tokens: 1"
    assert shown["mean error"].startswith("60.")
    assert shown["worst layer"].startswith("model.layers.")
    assert shown["delta"].endswith("times smaller")
    layouts = [
        checkpoint_layout(open_checkpoint(str(p)), torch.float32) for p in (tiny_folder, tuned)
    ]
    adapter = read_adapter(AdapterRef("out", 1, tmp_path / "out"), layouts[0])
    assert adapter.format == "BITDELTA"
    for module in layouts[0].module_shapes:
        (delta,) = adapter.modules[module]
        assert isinstance(delta, OneBit)
        change = layouts[1].weight(module) - layouts[0].weight(module)
        assert delta.scale == pytest.approx(float(change.abs().mean()), rel=1e-5)
        assert float((change - delta.dense()).norm() / change.norm()) < 0.65
    for module in ("model.embed_tokens", "lm_head"):
        (rows,) = adapter.modules[module]
        assert isinstance(rows, TokenRows)
        assert rows.ids.tolist() == [5, 70]
        assert torch.equal(rows.rows, layouts[1].weight(module)[[5, 70]])
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder)


def test_the_embedding_is_kept_in_16_bits_unless_asked_otherwise(
    run: Run, tiny_folder: Path, tuned: Path, tmp_path: Path
) -> None:
    assert run(tiny_folder, tuned, tmp_path / "out")[0] == 0
    assert load_file(tmp_path / "out" / WEIGHTS_FILE)[EMBEDDING].dtype == torch.bfloat16


def test_a_taken_folder_is_told_before_anything_is_opened(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    code, _, err = run("nothing", "nothing", tmp_path)
    assert code == 1
    assert "is not empty" in err


def test_what_is_no_model_is_named(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    code, _, err = run(tiny_folder, "nothing", tmp_path / "out")
    assert code == 1
    assert "nothing is not a model" in err


def test_the_base_itself_is_no_fine_tune(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    code, _, err = run(tiny_folder, tiny_folder, tmp_path / "out")
    assert code == 1
    assert "would change nothing" in err
    assert not (tmp_path / "out").exists()
