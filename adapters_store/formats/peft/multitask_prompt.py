"""PEFT's multitask prompt tuning (arXiv:2303.02861): embeddings of virtual tokens, which each task
multiplies, number by number, by a low-rank matrix of its own.

PEFT is told the task with each call; an adapter that is served is one task's, which our own key
`polydelta_task_id` in the config names.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

from torch import Tensor

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Delta, Prompt
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.prompt import (
    INITIALISATION,
    OF_BASE,
    check_embeddings,
)
from polydelta.adapters_store.formats.peft.virtual_tokens import (
    EMBEDDINGS,
    HONOURED,
    check_names,
    check_size,
    num_virtual_tokens,
)
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
    positive_int,
)
from polydelta.adapters_store.formats.peft_tensors import check_finite, check_shape
from polydelta.adapters_store.reference import CONFIG_FILE

TASK = "polydelta_task_id"

KEY_RULES = KeyRules(
    honoured=HONOURED | {"num_ranks", "num_tasks", TASK},
    harmless=COMMON_HARMLESS
    | OF_BASE
    | INITIALISATION
    | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"},
    refused=COMMON_REFUSED,
)

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


def outline(config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """The one prompt, from the config and the tensors' shapes alone.

    Raises InvalidAdapterError for all that is wrong whatever the base.
    """
    KEY_RULES.check(config)
    check_names(shapes, (EMBEDDINGS, _COLUMNS, _ROWS))
    check_embeddings(config, shapes[EMBEDDINGS])
    tasks = positive_int("num_tasks", config.get("num_tasks"))
    ranks = positive_int("num_ranks", config.get("num_ranks"))
    why = f"num_tasks, num_ranks, num_virtual_tokens and token_dim in {CONFIG_FILE}"
    check_shape(_COLUMNS, shapes[_COLUMNS], (tasks, num_virtual_tokens(config), ranks), why)
    check_shape(_ROWS, shapes[_ROWS], (tasks, ranks, config["token_dim"]), why)
    _task(config, tasks)
    return {MODEL: ModuleOutline(Prompt.kind, 0)}


def read(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    """The chosen task's prompt, in float32. Raises InvalidAdapterError."""
    outline(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    check_size("token_dim", config["token_dim"], layout.hidden_size)
    task = _task(config, config["num_tasks"])
    shared, columns, rows = (
        to_float32(name, tensors[name]) for name in (EMBEDDINGS, _COLUMNS, _ROWS)
    )
    prompt = Prompt(shared * (columns[task] @ rows[task]))
    check_finite(MODEL, (prompt,))
    return {MODEL: (prompt,)}


def _task(config: Config, tasks: int) -> int:
    task = config.get(TASK)
    if task is None and tasks == 1:
        return 0
    if not isinstance(task, int) or isinstance(task, bool) or not 0 <= task < tasks:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {TASK} is {reprlib.repr(task)}, but must say which of the adapter's "
            f"{tasks} tasks is meant: set it to a whole number from 0 to {tasks - 1}."
        )
    return task
