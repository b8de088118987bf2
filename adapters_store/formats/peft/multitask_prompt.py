"""PEFT's multitask prompt tuning (arXiv:2303.02861): embeddings of virtual tokens, which each task
multiplies, number by number, by a low-rank matrix of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Prompt
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.peft.prompt import (
    INITIALISATION,
    OF_BASE,
    embedding_shapes,
    read_embeddings,
)
from polydelta.adapters_store.formats.peft.virtual_tokens import (
    EMBEDDINGS,
    HONOURED,
    VirtualTokenFormat,
)
from polydelta.adapters_store.formats.peft_config import Config, key_rules, positive_int
from polydelta.adapters_store.formats.peft_options import TASK, task_id

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


def _shapes(config: Config) -> dict[str, Shape]:
    embeddings = embedding_shapes(config)
    count, size = embeddings[EMBEDDINGS]
    tasks = positive_int("num_tasks", config.get("num_tasks"))
    ranks = positive_int("num_ranks", config.get("num_ranks"))
    task_id("num_tasks", config)
    return {**embeddings, _COLUMNS: (tasks, count, ranks), _ROWS: (tasks, ranks, size)}


def _read(config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout) -> Prompt:
    """Of the chosen task."""
    shared, task = read_embeddings(config, tensors, layout), task_id("num_tasks", config)
    return Prompt(shared.embeddings * (tensors[_COLUMNS][task] @ tensors[_ROWS][task]))


FORMAT = VirtualTokenFormat(
    rules=key_rules(
        honoured=HONOURED | {"num_ranks", "num_tasks", TASK},
        harmless=OF_BASE
        | INITIALISATION
        | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"},
    ),
    kind=Prompt.kind,
    sizes="num_tasks, num_ranks, num_virtual_tokens and token_dim",
    shapes=_shapes,
    read_tokens=_read,
)
