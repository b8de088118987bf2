"""PEFT's Poly (arXiv:2202.13914), and with `n_splits` Multi-Head Routing (arXiv:2211.03831): LoRAs
for skills, mixed in shares that depend on the task.

For one task the mixture is a LoRA of rank r. With splits, inputs and outputs are cut into as many
parts, each of which has shares of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import TASK, linear_layers, one_of, task_id
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_EPSILON = 1e-12


@dataclass(frozen=True)
class _Settings:
    rank: int
    tasks: int
    skills: int
    splits: int
    task: int


def _settings(config: Config) -> _Settings:
    one_of("poly_type", config.get("poly_type"), ("poly",))
    rank, tasks, skills, splits = (
        positive_int(key, config.get(key)) for key in ("r", "n_tasks", "n_skills", "n_splits")
    )
    return _Settings(rank, tasks, skills, splits, task_id("n_tasks", config))


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank, skills, splits = settings.rank, settings.skills, settings.splits
    why = f"r, n_skills, n_splits and n_tasks in {CONFIG_FILE}"
    shapes.check(_A, (splits, skills, *shapes[_A][2:3], rank), why)
    shapes.check(_B, (splits, skills, rank, *shapes[_B][3:4]), why)
    shapes.check(_LOGITS, (settings.tasks, splits * skills), why)
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    rank, skills, splits = settings.rank, settings.skills, settings.splits
    out, in_ = tensors.out_features, tensors.in_features
    tensors.check_divides("n_splits", splits)
    tensors.check(_A, (splits, skills, in_ // splits, rank))
    tensors.check(_B, (splits, skills, rank, out // splits))
    # [splits, skills]
    shares = tensors[_LOGITS][settings.task].sigmoid().view(splits, skills)
    shares = shares / (shares.sum(1, keepdim=True) + _EPSILON)
    a = torch.einsum("qs,qsdr->rqd", shares, tensors[_A]).reshape(rank, in_)
    b = torch.einsum("qs,qsrd->qdr", shares, tensors[_B]).reshape(out, rank)
    return (LowRank(a, b / rank),)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={TASK, "n_skills", "n_splits", "n_tasks", "poly_type", "r"},
        harmless={"init_weights"},
    ),
    parameters=Parameters((_A, _B, _LOGITS)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
