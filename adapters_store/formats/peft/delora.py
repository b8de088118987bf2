"""PEFT's DeLoRA (arXiv:2503.18225): a LoRA whose directions have length 1 and whose strength is a
number of its own.

`y += B (lambda / r * (A (w x)) / (|a| |b|))`, |a| the lengths of A's rows, |b| those of B's
columns, and w those of the base weight's columns, as they were when training began.
"""

from __future__ import annotations

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
    mapping,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import (
    MODULE_CHOICE,
    linear_layers,
)
from polydelta.adapters_store.formats.peft_patterns import PatternTable
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_A, _B, _LAMBDA, _W_NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
_MIN_LENGTH = 1e-4


def _ranks(config: Config) -> PatternTable[int]:
    patterns = mapping("rank_pattern", config.get("rank_pattern"))
    default = positive_int("r", config.get("r"))
    return PatternTable("rank_pattern", patterns, default, positive_int)


def _outline(ranks: PatternTable[int], shapes: ModuleShapes) -> ModuleOutline:
    rank = ranks[shapes.module]
    why = f"rank {rank} (r and rank_pattern in {CONFIG_FILE})"
    shapes.check(_A, (rank, *shapes[_A][1:2]), why)
    shapes.check(_B, (*shapes[_B][:1], rank), why)
    shapes.check(_LAMBDA, (1,), "one strength a module")
    shapes.check(_W_NORM, shapes[_A][1:], f"one length for each column of {_A}")
    return ModuleOutline(LowRank.kind, rank)


def _read(_: PatternTable[int], tensors: ModuleTensors) -> tuple[LowRank]:
    rank = tensors.shapes[_A][0]
    tensors.check(_A, (rank, tensors.in_features))
    tensors.check(_B, (tensors.out_features, rank))
    a, b = tensors[_A], tensors[_B]
    lengths = a.norm(dim=1).clamp(min=_MIN_LENGTH) * b.norm(dim=0).clamp(min=_MIN_LENGTH)
    return (LowRank(a * tensors[_W_NORM], b * (tensors[_LAMBDA] / rank / lengths)),)


FORMAT = PeftFormat(
    rules=KeyRules(
        honoured=frozenset({"r", "rank_pattern"}),
        harmless=COMMON_HARMLESS
        | MODULE_CHOICE
        | {
            # Biases that were trained are read with the saved modules.
            "bias",
            # Where the strengths began.
            "delora_lambda",
            "lambda_pattern",
            "init_weights",
            "module_dropout",
        },
        refused=COMMON_REFUSED,
    ),
    parameters=Parameters((_A, _B, _LAMBDA, _W_NORM)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_ranks,
)
