"""`polydelta adapters convert`: LoRAs that PEFT reads, and models that transformers reads."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, LlamaForCausalLM, PreTrainedModel

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.reference import CONFIG_FILE
from polydelta.engine.models.checkpoint import default_model, open_checkpoint
from polydelta.server.settings import packaged_samples

Run = Callable[..., tuple[int, str, str]]
Facts = Callable[[str], dict[str, str]]

TOKENS = torch.tensor([[1, 4000, 7, 7, 30, 49151, 0]])


@pytest.fixture
def run(polydelta: Run) -> Run:
    """Runs `polydelta adapters convert ...`; (exit code, stdout, stderr)."""
    return partial(polydelta, "adapters", "convert")


@pytest.fixture
def shira(tiny_layout: BaseLayout, adapter_writer: Callable) -> Path:
    return adapter_writer(tiny_layout).shira("shira", rank=3)


def logits(model: PreTrainedModel, adapter: Path | None = None) -> Tensor:
    if adapter is not None:
        model = PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_lora_of_full_rank_does_what_the_sparse_adapter_does(
    run: Run,
    facts: Facts,
    shira: Path,
    tiny_folder: Path,
    tiny_model: LlamaForCausalLM,
    tmp_path: Path,
) -> None:
    code, out, err = run(shira, tmp_path / "out", "--model", tiny_folder, "--energy", 1)
    assert (code, err) == (0, "")
    told = facts(out)
    assert (told["from"], told["format"]) == ("SHIRA (Sparse)", "LORA in float32")
    assert (told["modules"], told["error"][:5]) == ("21", "0.00%")
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["base_model_name_or_path"]
    want, got = logits(tiny_model, shira), logits(tiny_model, tmp_path / "out")
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
    assert (want - logits(tiny_model)).abs().max() > 0.1


def test_the_rank_is_what_is_asked_for_and_the_error_is_told(
    run: Run, facts: Facts, shira: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    code, out, _ = run(
        *(shira, tmp_path / "out", "--model", tiny_folder, "--rank", 5, "--dtype", "bfloat16")
    )
    assert code == 0
    told = facts(out)
    assert (told["ranks"], told["format"]) == ("5", "LORA in bfloat16")
    assert "% of the change is beyond the ranks (" in told["error"]
    assert "in model.layers." in told["error"]
    assert inspect(tmp_path / "out").ranks == (5,)


def test_a_lora_stays_as_it_is(
    run: Run,
    facts: Facts,
    tiny_layout: BaseLayout,
    adapter_writer: Callable,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    lora = adapter_writer(tiny_layout).lora("lora", rank=7, targets=("q_proj",))
    code, out, _ = run(lora, tmp_path / "out", "--model", tiny_folder)
    told = facts(out)
    assert code == 0
    assert (told["ranks"], told["error"]) == ("7", "none: exact but for rounding")


def test_a_merged_model_does_what_the_adapter_does(
    run: Run,
    facts: Facts,
    shira: Path,
    tiny_folder: Path,
    tiny_model: LlamaForCausalLM,
    tmp_path: Path,
) -> None:
    arguments = (shira, tmp_path / "out", "--to", "model", "--model", tiny_folder)
    code, out, err = run(*arguments, "--dtype", "float32")
    assert (code, err) == (0, "")
    told = facts(out)
    assert (told["format"], told["head"]) == ("model in float32", "as in the base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), logits(tiny_model, shira), atol=2e-4, rtol=2e-4)
    assert open_checkpoint(str(tmp_path / "out")).config == open_checkpoint(str(tiny_folder)).config


def test_a_model_is_written_in_the_dtype_that_it_is_served_in(
    run: Run, facts: Facts, shira: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    code, out, _ = run(shira, tmp_path / "out", "--to", "model", "--model", tiny_folder)
    assert code == 0
    assert facts(out)["format"] == "model in bfloat16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_wrong_arguments_are_one_line_each(
    run: Run, shira: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        ((shira, out, "--rank", 0), "rank is 0"),
        ((shira, out, "--energy", 1.5), "energy is 1.5"),
        ((shira, out, "--rank", 3, "--energy", 0.5), "not both"),
        ((shira, out, "--to", "model", "--rank", 3), "leave them out with --to model"),
        ((shira, shira), "is not empty"),
        ((shira, tiny_folder, "--to", "model"), "is not empty"),
        ((tmp_path / "nothing", out), "There is no folder"),
    ):
        code, told, err = run(*arguments, "--model", tiny_folder)
        assert (code, told) == (1, "")
        assert message in err
    assert not out.exists()


@pytest.mark.slow
def test_a_sample_merged_into_the_default_model_is_what_peft_makes_of_both(
    run: Run, tmp_path: Path
) -> None:
    sample, path = packaged_samples()[0] / "ticket-label", default_model()
    code, _, err = run(sample, tmp_path / "out", "--to", "model", "--dtype", "float32")
    assert (code, err) == (0, "")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    base = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    torch.testing.assert_close(logits(merged), logits(base, sample), atol=2e-3, rtol=1e-3)
