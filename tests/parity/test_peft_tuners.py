"""What becomes of each type of adapter that PEFT can make: served, converted, or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.delta_kinds import (
    BIAS,
    CIRCULANT,
    DENSE,
    KRONECKER,
    LOW_RANK,
    NORM_WEIGHT,
    PREFIX,
    PROMPT,
    ROTATE,
    SCALE,
    SPARSE,
    TOKEN_ROWS,
)
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.refusals import REFUSALS
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.reference import AdapterRef

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ALL = {"target_modules": LINEARS}
# They are asked for one of their tasks.
WITH_TASKS = {"POLY", "MULTITASK_PROMPT_TUNING"}
TOKENS = [5, 30, 7, 7, 21, 38, 2, 11, 0, 19, 33]


@dataclass(frozen=True)
class Served:
    """With deltas of these kinds, which give PEFT's own logits."""

    kinds: tuple[str, ...]
    # Of PEFT's config.
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """Read, so that it can be written as another type."""

    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """With a message that has this fragment."""

    reason: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # Why it is not made here; then the config alone is looked at.
    not_made: str = ""


TUNERS: Mapping[str, Served | Converted | Refused] = {
    "ADALORA": Served((LOW_RANK,), {"init_r": 4, "target_r": 2, "total_step": 9, **ALL}),
    "ADAMSS": Refused("rows of a layer", not_made="PEFT needs scikit-learn for it"),
    "ADAPTION_PROMPT": Refused(
        "an attention of their own", {"adapter_len": 3, "adapter_layers": 2}
    ),
    "BEFT": Served((BIAS,), SOME),
    "BOFT": Converted({"boft_block_size": 4, **SOME}),
    "C3A": Served((CIRCULANT,), {"block_size": 4, **ALL}),
    "CARTRIDGE": Served((PREFIX,), {"num_virtual_tokens": 7}),
    "CPT": Served((PROMPT,), {"cpt_token_ids": [3, 1, 4, 1, 5]}),
    "DEFT": Served((LOW_RANK,), {"r": 3, **ALL}),
    "DELORA": Served((LOW_RANK,), {"r": 3, **ALL}),
    "FOURIERFT": Converted({"n_frequency": 30, **SOME}),
    "FROD": Converted({"progressbar": False, **SOME}),
    "GLORA": Converted({"r": 3, **SOME}),
    "GRALORA": Served((LOW_RANK,), {"r": 4, "gralora_k": 2, **ALL}),
    "HIRA": Converted({"r": 3, **SOME}),
    "HRA": Served((LOW_RANK,), {"r": 4, **ALL}),
    "IA3": Served(
        (SCALE,),
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "LILY": Refused("router averages over all tokens", {"r": 3, "stride_A": 1, "num_B": 2, **SOME}),
    "LN_TUNING": Served((NORM_WEIGHT,), {"target_modules": ["input_layernorm", "norm"]}),
    "LOHA": Served((LOW_RANK,), {"r": 3, **ALL}),
    "LOKR": Served((KRONECKER,), {"r": 3, **ALL}),
    "LORA": Served((LOW_RANK,), {"r": 3, **ALL}),
    "MISS": Served((LOW_RANK,), {"r": 4, **ALL}),
    "MULTITASK_PROMPT_TUNING": Served((PROMPT,), {"num_virtual_tokens": 5, "num_tasks": 1}),
    "OFT": Converted({"oft_block_size": 4, **SOME}),
    "OSF": Converted({"effective_rank": 9, **SOME}),
    "PEANUT": Served((LOW_RANK,), {"r": 7, "depth": 1, "scaling": 9.0, **ALL}),
    "POLY": Served((LOW_RANK,), {"r": 4, "n_tasks": 1, "n_skills": 2, **SOME}),
    "PREFIX_TUNING": Served((PREFIX,), {"num_virtual_tokens": 5}),
    "PROMPT_TUNING": Served((PROMPT,), {"num_virtual_tokens": 5}),
    "PSOFT": Served((LOW_RANK,), {"r": 4, **ALL}),
    "PVERA": Served((LOW_RANK,), {"r": 6, **ALL}),
    "P_TUNING": Served((PROMPT,), {"num_virtual_tokens": 5, "encoder_hidden_size": 8}),
    "RANDLORA": Converted({"r": 6, **SOME}),
    "ROAD": Served((ROTATE,), {"group_size": 4, **ALL}),
    "SHADOW": Refused("a second model", {"r": 2}),
    "SHIRA": Served((SPARSE,), {"r": 2, **SOME}),
    "SUPERTUNING": Served((SPARSE,), {"sparsity": 0.9, **ALL}),
    "TINYLORA": Served((LOW_RANK,), {"r": 2, "u": 4, **ALL}),
    "TRAINABLE_TOKENS": Served((TOKEN_ROWS,), {"token_indices": [2, 7, 21]}),
    "UNILORA": Served((LOW_RANK,), {"r": 3, **ALL}),
    "VBLORA": Served((LOW_RANK,), {"r": 4, "num_vectors": 8, "vector_length": 4, **ALL}),
    "VERA": Served((LOW_RANK,), {"r": 6, **ALL}),
    "WAVEFT": Served((SPARSE,), {"n_frequency": 30, **ALL}),
    "XLORA": Refused("runs the model twice", not_made="it is a folder of several adapters"),
}


def of_result(kind: type) -> dict[str, Any]:
    return {name: row for name, row in TUNERS.items() if isinstance(row, kind)}


def test_every_type_of_peft_has_its_row() -> None:
    assert {member.value for member in PeftType} == TUNERS.keys()


def test_a_type_is_refused_whatever_its_config_or_not_at_all() -> None:
    assert REFUSALS.keys() == of_result(Refused).keys()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        vocab_size=40,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def make(model: LlamaForCausalLM, tmp_path: Path) -> Callable[[str], Path]:
    """The folder of an adapter, made by PEFT, all that it trains random."""

    def make(name: str) -> Path:
        row, folder = TUNERS[name], tmp_path / name.lower()
        if isinstance(row, Refused) and row.not_made:
            folder.mkdir()
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": name}))
            return folder
        torch.manual_seed(1)
        config = PEFT_TYPE_TO_CONFIG_MAPPING[name](task_type="CAUSAL_LM", **row.options)
        peft = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        peft.eval().save_pretrained(folder)
        return folder

    return make


@torch.inference_mode()
def logits_of_peft(name: str, base: LlamaForCausalLM, folder: Path) -> torch.Tensor:
    """[tokens, vocab]"""
    peft: Any = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    tokens = torch.tensor([TOKENS])
    extra = {"task_ids": torch.tensor([0])} if name in WITH_TASKS else {}
    out = peft(input_ids=tokens, attention_mask=torch.ones_like(tokens), **extra)
    # Virtual tokens have logits too.
    return out.logits[0, -len(TOKENS) :]


@pytest.mark.parametrize("name", of_result(Served))
def test_a_served_type_gives_the_logits_of_peft(
    name: str, model: LlamaForCausalLM, make: Callable[[str], Path], paged: Callable[..., Any]
) -> None:
    folder, decoder = make(name), paged(model)
    for summary in (inspect(folder), inspect(folder, decoder.layout)):
        assert (summary.format, summary.problem) == (name, None)
        assert summary.kinds == TUNERS[name].kinds
    assert read_adapter(AdapterRef(name, 1, folder), decoder.layout).kinds == summary.kinds
    (got,) = decoder.feed((0, TOKENS, decoder.load(folder)))
    want = logits_of_peft(name, model, folder)
    with torch.inference_mode():
        bare = model(torch.tensor([TOKENS])).logits[0]
    assert (want - bare).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", of_result(Converted))
def test_a_type_that_is_only_converted_is_read_and_says_so(
    name: str, make: Callable[[str], Path], paged: Callable[..., Any], model: LlamaForCausalLM
) -> None:
    folder, layout = make(name), paged(model).layout
    assert DENSE in read_adapter(AdapterRef(name, 1, folder), layout).kinds
    for summary in (inspect(folder), inspect(folder, layout)):
        assert summary.format == name
        assert "polydelta adapters convert" in summary.problem


@pytest.mark.parametrize("name", of_result(Refused))
def test_a_refused_type_is_refused_with_its_reason(name: str, make: Callable[[str], Path]) -> None:
    summary = inspect(make(name))
    assert TUNERS[name].reason in summary.problem
    assert summary.problem.startswith(f"adapter_config.json: peft_type is '{name}'")
