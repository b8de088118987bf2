"""`polydelta adapters import`, with models in folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.reference import CONFIG_FILE, AdapterRef
from polydelta.engine.models.base_weights import checkpoint_layout
from polydelta.engine.models.checkpoint import open_checkpoint

Run = Callable[..., tuple[int, str, str]]
Facts = Callable[[str], dict[str, str]]
Save = Callable[[LlamaForCausalLM, Path], Path]

UP, DOWN, NORM = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.norm"


@pytest.fixture
def run(polydelta: Run) -> Run:
    """Runs `polydelta adapters ...`; (exit code, stdout, stderr)."""
    return partial(polydelta, "adapters")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=321,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).bfloat16()


@pytest.fixture
def base(model: LlamaForCausalLM, save_model: Save, tmp_path: Path) -> Path:
    return save_model(model, tmp_path / "base")


def read(folder: Path, base: Path) -> Adapter:
    layout = checkpoint_layout(open_checkpoint(str(base)), torch.float32)
    return read_adapter(AdapterRef(folder.name, 1, folder), layout)


def test_a_model_tuned_with_s2ft_becomes_an_adapter_of_its_base(
    run: Run, facts: Facts, model: LlamaForCausalLM, base: Path, save_model: Save, tmp_path: Path
) -> None:
    tuned = copy.deepcopy(model)
    channels = torch.randperm(96)
    with torch.no_grad():
        tuned.get_submodule(UP).weight[7] += 1
        mlp = tuned.model.layers[1].mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[channels].clone())
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, channels].clone())
    tuned.resize_token_embeddings(328, mean_resizing=False)
    source, out = save_model(tuned, tmp_path / "tuned"), tmp_path / "out"
    code, _, err = run("import", "s2ft", source, out, "--model", base)
    assert code == 1
    assert "has 328 tokens, the base has 321" in err
    code, told, err = run("import", "s2ft", source, out, "--model", base, "--cut-vocabulary")
    assert (code, err) == (0, "")
    assert facts(told)["format"] == "S2FT"
    assert (facts(told)["linear layers"], facts(told)["kept whole"]) == ("1", "nothing")
    ((rows,),) = read(out, base).modules.values()
    want = torch.zeros(96, 64)
    before = model.get_submodule(UP).weight[7]
    want[7] = (before + 1).float() - before.float()
    assert torch.equal(rows.dense(), want)
    config = json.loads((out / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert run("inspect", out, "--model", base)[0] == 0


def test_a_sparse_fine_tuning_is_imported_with_what_it_has_whole(
    run: Run, facts: Facts, model: LlamaForCausalLM, base: Path, tmp_path: Path
) -> None:
    steps = {
        "size": torch.Size((64, 96)),
        "index_steps": [65, 64],
        "values": torch.tensor([1, 2.0]),
    }
    content = {
        "diffs": {f"{DOWN}.weight": steps},
        "abs": {f"{NORM}.weight": torch.full((64,), 2.0)},
    }
    torch.save(content, tmp_path / "pytorch_diff.bin")
    code, told, _ = run("import", "sft", tmp_path, tmp_path / "out", "--model", base)
    assert code == 0
    assert (facts(told)["linear layers"], facts(told)["kept whole"]) == ("1", "norm: 1")
    adapter = read(tmp_path / "out", base)
    assert adapter.modules.keys() == {DOWN, NORM}
    (sparse,), (norm,) = adapter.modules[DOWN], adapter.modules[NORM]
    assert sparse.dense().nonzero().tolist() == [[1, 1], [1, 2]]
    assert norm.weight.tolist() == [2.0] * 64


def test_a_bitdelta_is_imported_with_its_scale(
    run: Run, facts: Facts, model: LlamaForCausalLM, base: Path, tmp_path: Path
) -> None:
    content = {
        f"{DOWN}.mask": torch.full((3, 64), -1, dtype=torch.int32),
        f"{DOWN}.coeff": torch.tensor(0.25),
        **{name: p for name, p in model.named_parameters() if "_proj" not in name},
    }
    torch.save(content, tmp_path / "diff.pt")
    code, told, _ = run(
        "import", "bitdelta", tmp_path / "diff.pt", tmp_path / "out", "--model", base
    )
    assert code == 0
    assert facts(told)["kept whole"] == "nothing"
    ((one_bit,),) = read(tmp_path / "out", base).modules.values()
    assert torch.equal(one_bit.dense(), torch.full((64, 96), 0.25))


@pytest.mark.parametrize("kind", ["s2ft", "sft", "bitdelta"])
def test_a_taken_folder_is_told_before_anything_is_opened(
    kind: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("kept")
    code, _, err = run("import", kind, "nothing", tmp_path, "--model", "nothing")
    assert code == 1
    assert "is not empty" in err


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("s2ft", "nothing is not a model"),
        ("sft", "nothing cannot be read"),
        ("bitdelta", "nothing cannot be read"),
    ],
)
def test_a_source_that_is_not_there_is_one_clear_error(
    kind: str, message: str, run: Run, base: Path, tmp_path: Path
) -> None:
    code, out, err = run("import", kind, "nothing", tmp_path / "out", "--model", base)
    assert (code, out) == (1, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_the_base_itself_is_no_fine_tune(run: Run, base: Path, tmp_path: Path) -> None:
    code, _, err = run("import", "s2ft", base, tmp_path / "out", "--model", base)
    assert code == 1
    assert "would change nothing" in err
