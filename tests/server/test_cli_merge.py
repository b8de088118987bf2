"""`polydelta adapters merge`, over the default model's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

Run = Callable[..., tuple[int, str, str]]
Facts = Callable[[str], dict[str, str]]

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
K3 = "base_model.model.model.layers.3.self_attn.k_proj"
HIDDEN, KV = 576, 192


@pytest.fixture
def run(polydelta: Run, monkeypatch: pytest.MonkeyPatch, adapters: Path) -> Run:
    """Runs `polydelta adapters merge ...`; (exit code, stdout, stderr)."""
    monkeypatch.setenv("POLYDELTA_ADAPTERS", str(adapters))
    return partial(polydelta, "adapters", "merge")


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """Two LoRAs, of rank 2 and 3, and a SHiRA."""
    torch.manual_seed(0)
    root = tmp_path / "adapters"
    for name, rank in (("two", 2), ("three", 3)):
        lora = {
            f"{Q0}.lora_A.weight": torch.randn(rank, HIDDEN),
            f"{Q0}.lora_B.weight": torch.randn(HIDDEN, rank),
        }
        if rank == 3:
            lora[f"{K3}.lora_A.weight"] = torch.randn(rank, HIDDEN)
            lora[f"{K3}.lora_B.weight"] = torch.randn(KV, rank)
        write(root / name, {"peft_type": "LORA", "r": rank, "lora_alpha": rank}, lora)
    shira = {
        f"{Q0}.shira_weight": torch.randn(50),
        f"{Q0}.shira_indices": torch.stack((torch.arange(50), torch.arange(50) * 11)).int(),
    }
    write(root / "sparse", {"peft_type": "SHIRA", "r": 1}, shira)
    return root


def write(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    config |= {"target_modules": ["q_proj"], "base_model_name_or_path": "maker/base"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS_FILE)


def change(folder: Path, module: str = Q0) -> torch.Tensor:
    tensors = load_file(folder / WEIGHTS_FILE)
    b, a = (tensors[f"{module}.lora_{side}.weight"].float() for side in "BA")
    return b @ a


def test_linear_writes_the_exact_sum_and_tells_what_it_wrote(
    run: Run, facts: Facts, adapters: Path, tmp_path: Path
) -> None:
    code, out, err = run(tmp_path / "out", f"{adapters / 'two'}=0.5", "three=-2")
    assert (code, err) == (0, "")
    told = facts(out)
    assert (told["method"], told["modules"], told["ranks"]) == ("linear", "2", "3, 5")
    assert told["format"] == "LORA in float32"
    assert told["error"].startswith("none")
    want = 0.5 * change(adapters / "two") - 2 * change(adapters / "three")
    torch.testing.assert_close(change(tmp_path / "out"), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(change(tmp_path / "out", K3), -2 * change(adapters / "three", K3))
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "maker/base"


def test_the_merged_adapter_can_be_served_and_merged_again(
    run: Run, facts: Facts, adapters: Path, tmp_path: Path
) -> None:
    run(adapters / "both", "two=1", "three=1")
    code, out, _ = run(tmp_path / "less", "both=1", "three=-1", "--rank", 2, "--dtype", "bfloat16")
    assert code == 0
    told = facts(out)
    assert (told["format"], told["ranks"]) == ("LORA in bfloat16", "2")
    assert told["error"].startswith("0.00% of the change")
    torch.testing.assert_close(
        change(tmp_path / "less"), change(adapters / "two"), atol=0.2, rtol=0.02
    )


def test_options_reach_the_recipe(run: Run, facts: Facts, tmp_path: Path) -> None:
    code, out, _ = run(
        *(tmp_path / "out", "two=0.7", "sparse=0.5", "--method", "dare-ties", "--density", 0.2),
        *("--rank", 4, "--seed", 9, "--election", "count"),
    )
    assert code == 0
    told = facts(out)
    assert told["method"] == "dare-ties, density 0.2, election by count, seed 9"
    assert told["ranks"] == "4"
    assert "beyond the rank" in told["error"]


def test_sparse_adapters_alone_stay_sparse(run: Run, facts: Facts, tmp_path: Path) -> None:
    code, out, _ = run(tmp_path / "out", "sparse=3")
    assert code == 0
    assert facts(out)["format"] == "SHIRA in float32"
    assert "ranks" not in facts(out)


def test_help_teaches_with_examples(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for words in ("Examples", "polydelta adapters merge", "--rank", "dare-ties"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("two",), "'two' has no weight; write two=1.0"),
        (("=0.5",), "'=0.5' has no weight"),
        (("two=much",), "the weight of 'two' is 'much'"),
        (("two=nan",), "the weight of 'two' is 'nan'"),
        (("two=0",), "the weight of 'two' is '0'"),
        (("nobody=1",), "no folder 'nobody'"),
        (("../adapters/two=1",), "no folder '../adapters/two'"),
        (("two=1", "--density", "0.5"), "density is 0.5"),
        (("two=1", "--method", "ties"), "density is not given"),
        (("two=1", "--rank", "0"), "rank is 0"),
        (("two=1", "--seed", "-1"), "seed is -1"),
        (("two=1", "sparse=1"), "rank is not given"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...],
    message: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path / "adapters" / "two")
    code, out, err = run(tmp_path / "out", *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_wrong_choice_is_code_2(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "out", "two=1", "--method", "soup")[0] == 2
    assert run(tmp_path / "out", "two=1", "--dtype", "int8")[0] == 2
    assert run(tmp_path / "out")[0] == 2


def test_a_folder_in_use_is_told_before_anything_is_read(run: Run, adapters: Path) -> None:
    (adapters / "three" / CONFIG_FILE).write_text("{")
    code, _, err = run(adapters / "two", "three=1")
    assert code == 1
    assert "is not empty" in err
    assert err.count("\n") == 1


def test_a_broken_adapter_is_named(run: Run, adapters: Path, tmp_path: Path) -> None:
    (adapters / "three" / CONFIG_FILE).write_text("{")
    code, _, err = run(tmp_path / "out", "two=1", "three=1")
    assert code == 1
    assert str(adapters / "three") in err
    assert "not valid JSON" in err
