from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MultitaskPromptTuningConfig, PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Prompt
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.registry import format_of
from polydelta.adapters_store.reference import AdapterRef

COUNT, HIDDEN, TASKS, RANKS = 5, 36, 3, 2


@pytest.mark.parametrize("task", range(TASKS))
def test_the_chosen_task_s_embeddings_answer_as_peft_does_when_told_the_task(
    task: int,
    make_peft: Callable[..., PeftModel],
    base_model: LlamaForCausalLM,
    layout: BaseLayout,
    tmp_path: Path,
) -> None:
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=COUNT, num_tasks=TASKS, num_ranks=RANKS
    )
    peft = make_peft(config, base_model.eval(), std=0.7)
    config_file = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(config_file.read_text()) | {"polydelta_task_id": task}
    config_file.write_text(json.dumps(saved))
    adapter = read_adapter(AdapterRef("adapter", 1, tmp_path / "adapter"), layout)
    ((module, (delta,)),) = adapter.modules.items()
    assert module == MODEL
    assert isinstance(delta, Prompt)
    ids, task_ids = torch.tensor([[3, 17, 0, 39, 5, 5, 21]]), torch.tensor([task])
    with torch.no_grad():
        (want,) = peft.get_prompt(batch_size=1, task_ids=task_ids)
        torch.testing.assert_close(delta.embeddings, want, rtol=0, atol=1e-6)
        own = base_model.get_input_embeddings()(ids)
        got = base_model(
            inputs_embeds=torch.cat((delta.embeddings.unsqueeze(0), own), dim=1),
            position_ids=torch.arange(COUNT + ids.shape[1]).unsqueeze(0),
        ).logits
        logits = peft(input_ids=ids, task_ids=task_ids).logits
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-5)


CONFIG: dict[str, Any] = {
    "peft_type": "MULTITASK_PROMPT_TUNING",
    "num_virtual_tokens": COUNT,
    "token_dim": HIDDEN,
    "num_tasks": TASKS,
    "num_ranks": RANKS,
    "polydelta_task_id": 1,
    "prompt_tuning_init": "EXACT_SOURCE_TASK",
    "prompt_tuning_init_task": 4,
    "prompt_tuning_init_state_dict_path": "source.safetensors",
}
NAMES = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")


def task_tensors(tasks: int = TASKS) -> dict[str, Tensor]:
    torch.manual_seed(6)
    shapes = (COUNT, HIDDEN), (tasks, COUNT, RANKS), (tasks, RANKS, HIDDEN)
    return {name: torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=True)}


def read(layout: BaseLayout, config: dict[str, Any], tensors: dict[str, Tensor]) -> Prompt:
    _, parser = format_of(config)
    ((delta,),) = parser.read(config, tensors, layout).values()
    assert isinstance(delta, Prompt)
    return delta


def test_the_only_task_need_not_be_named(layout: BaseLayout) -> None:
    config = {key: CONFIG[key] for key in CONFIG if key != "polydelta_task_id"} | {"num_tasks": 1}
    tensors = task_tensors(tasks=1)
    shared, columns, rows = (tensors[name] for name in NAMES)
    want = shared * (columns[0] @ rows[0])
    torch.testing.assert_close(read(layout, config, tensors).embeddings, want)


def test_its_outline_is_one_prompt_of_the_model() -> None:
    _, parser = format_of(CONFIG)
    shapes = {name: tuple(tensor.shape) for name, tensor in task_tensors().items()}
    assert parser.outline(CONFIG, shapes) == {MODEL: ModuleOutline("Prompt", 0)}


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no task": ({"polydelta_task_id": None}, "polydelta_task_id is None.* 3 tasks .* 0 to 2"),
    "a task too many": ({"polydelta_task_id": 3}, "polydelta_task_id is 3"),
    "a negative task": ({"polydelta_task_id": -1}, "polydelta_task_id is -1"),
    "a task that is no number": ({"polydelta_task_id": True}, "polydelta_task_id is True"),
    "another number of tasks": ({"num_tasks": 4}, r"asks for \[4, 5, 2\]"),
    "another number of ranks": ({"num_ranks": 1}, r"asks for \[3, 5, 1\]"),
    "another number of tokens": ({"num_virtual_tokens": 6}, r"asks for \[6, 36\]"),
    "an encoder and a decoder": ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
}


@pytest.mark.parametrize(
    ("option", "message"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS.keys()
)
def test_an_option_that_is_not_served_is_refused_by_name(
    option: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, CONFIG | option, task_tensors())


def test_a_prompt_of_another_base_is_refused_by_name(layout: BaseLayout) -> None:
    wider = dataclasses.replace(layout, hidden_size=48)
    with pytest.raises(InvalidAdapterError, match="token_dim is 36, but the base model has 48"):
        read(wider, CONFIG, task_tensors())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prefix_task_rows", torch.nan, "prefix_task_rows' has NaN or infinite"),
        ("prefix_task_cols", 3e38, "beyond what float32 holds"),
    ],
)
def test_numbers_that_float32_does_not_hold_are_refused(
    name: str, value: float, message: str, layout: BaseLayout
) -> None:
    tensors = task_tensors()
    tensors[name].fill_(value)
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, CONFIG, tensors)
