"""The command line, as far as it goes without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file

from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.records import AdapterFacts, AdapterRecord, Source
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE
from polydelta.adapters_store.store import AdapterStore, StoreConfig


@pytest.fixture
def run(polydelta):
    return polydelta


@pytest.fixture
def adapters(tmp_path):
    """A folder with one good LoRA, one of another base model, and one whose config is broken."""
    good, other, bad = (tmp_path / name for name in ("good-one", "other-base", "bad-one"))
    for folder in (good, other, bad):
        folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    for folder, size in ((good, 576), (other, 8)):
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        weights = {
            f"{module}.lora_A.weight": torch.ones(2, size),
            f"{module}.lora_B.weight": torch.ones(size, 2),
        }
        save_file(weights, folder / WEIGHTS_FILE)
    (bad / CONFIG_FILE).write_text("{")
    return tmp_path


def test_version_prints_the_version(run):
    assert run("version") == (0, f"{version('polydelta')}\n", "")


def test_help_teaches_with_examples(run):
    for command in ("serve", "generate"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"polydelta {command}" in out
        assert "Examples" in out


def test_help_tells_the_defaults_of_the_settings(run):
    _, out, _ = run("serve", "--help")
    assert "[default: 8000]" in out
    assert "[default: bfloat16]" in out


def test_without_a_command_there_is_help(run):
    code, out, err = run()
    assert code == 2
    assert "serve" in out + err


def test_a_wrong_option_is_code_2(run):
    assert run("serve", "--no-such-option")[0] == 2


def test_a_wrong_setting_is_one_line_and_code_1(run):
    code, out, err = run("serve", "--pool", "2 apples")
    assert (code, out) == (1, "")
    assert err.startswith("Error: --pool")
    assert err.count("\n") == 1


def test_a_taken_port_is_told_before_the_model_loads(run):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--port", str(port))
    assert code == 1
    assert f"port {port}" in err
    assert "--port" in err


def test_generate_names_an_unknown_adapter_before_the_model_loads(run, adapters):
    code, _, err = run("generate", "Hi", "--adapter", "nobody", "--adapters", str(adapters))
    assert code == 1
    assert "nobody" in err
    assert err.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line(run, tmp_path):
    code, _, err = run("generate", "Hi", "--model", str(tmp_path / "nothing"))
    assert code == 1
    assert err.startswith("Error:")
    assert "Traceback" not in err


def test_generate_opens_the_store_only_for_an_adapter(run, tmp_path):
    # A store that can be no folder stands for a home that cannot be written.
    (tmp_path / "store").write_text("a file")
    arguments = ("--model", str(tmp_path / "nothing"), "--store", str(tmp_path / "store"))
    _, _, err = run("generate", "Hi", *arguments)
    assert "nothing" in err
    assert "store" not in err.replace(str(tmp_path), "")
    _, _, err = run("generate", "Hi", "--adapter", "iso-date", *arguments)
    assert "--store" in err


def test_inspect_takes_an_id_and_says_when_there_is_none(run):
    code, out, _ = run("adapters", "inspect", "iso-date")
    assert code == 0
    assert "q_proj: 30" in out
    code, _, err = run("adapters", "inspect", "nobody@3")
    assert code == 1
    assert "no folder 'nobody@3'" in err
    assert "--store" in err


def test_adapters_list_shows_uploads_beside_folders(run, tmp_path):
    store = AdapterStore(StoreConfig(tmp_path / "store"), FolderCatalog([]))
    record = AdapterRecord(
        "uploaded", 0, "0" * 64, AdapterFacts("LORA", ("LowRank",), 12, 30, 2048), "", 1.0,
        Source.UPLOAD,
    )  # fmt: skip
    store.catalog.add(record)
    store.close()
    code, out, _ = run("adapters", "list", "--store", str(tmp_path / "store"))
    assert code == 0
    row = next(line for line in out.splitlines() if "uploaded@1" in line)
    assert "LORA" in row
    assert "12" in row
    assert "2.0KiB" in row
    assert any("iso-date@1" in line for line in out.splitlines())


def test_adapters_list_shows_what_can_be_served_and_what_not(run, adapters):
    code, out, _ = run("adapters", "list", str(adapters))
    assert code == 0
    good = next(line for line in out.splitlines() if "good-one" in line)
    bad = next(line for line in out.splitlines() if "bad-one" in line)
    assert "LORA" in good
    assert "yes" in good
    assert "no:" in bad


def test_adapters_inspect_shows_the_facts(run, adapters):
    code, out, _ = run("adapters", "inspect", str(adapters / "good-one"))
    assert code == 0
    for fact in ("good-one", "LORA", "LowRank", "q_proj", "yes"):
        assert fact in out


def test_adapters_inspect_checks_against_the_base_model(run, adapters):
    code, out, _ = run("adapters", "inspect", str(adapters / "other-base"))
    assert code == 1
    assert "can be served by SmolLM2-135M-Instruct" in out
    assert "no:" in out


def test_adapters_inspect_of_a_bad_one_is_code_1_and_says_why(run, adapters):
    code, out, _ = run("adapters", "inspect", str(adapters / "bad-one"))
    assert code == 1
    assert "no:" in out


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "polydelta.server", "version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == version("polydelta")


def test_help_does_not_wait_for_torch():
    program = "import sys; from polydelta.server import cli, app; print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "False"
