"""PEFT's DeLoRA (arXiv:2503.18225): a LoRA whose directions have length 1 and whose strength is a
number of its own.

`y += B (lambda / r * (A (w x)) / (|a| |b|))`, |a| the lengths of A's rows, |b| those of B's
columns, and w those of the base weight's columns, as they were when training began.
"""

from __future__ import annotations

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import key_rules
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, rank_table
from polydelta.adapters_store.formats.peft_patterns import PatternTable
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_A, _B, _LAMBDA, _W_NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
_MIN_LENGTH = 1e-4


def _outline(ranks: PatternTable[int], shapes: ModuleShapes) -> ModuleOutline:
    rank = ranks[shapes.module]
    why = f"rank {rank} (r and rank_pattern in {CONFIG_FILE})"
    shapes.check_factors(_A, _B, rank, why)
    shapes.check(_LAMBDA, (1,), "one strength a module")
    shapes.check(_W_NORM, shapes[_A][1:], f"one length for each column of {_A}")
    return ModuleOutline(LowRank.kind, rank)


def _read(_: PatternTable[int], tensors: ModuleTensors) -> tuple[LowRank]:
    rank = tensors.shapes[_A][0]
    tensors.check_factors(_A, _B, rank)
    a, b = tensors[_A], tensors[_B]
    lengths = a.norm(dim=1).clamp(min=_MIN_LENGTH) * b.norm(dim=0).clamp(min=_MIN_LENGTH)
    return (LowRank(a * tensors[_W_NORM], b * (tensors[_LAMBDA] / rank / lengths)),)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"r", "rank_pattern"},
        harmless={
            # Where the strengths began.
            "delora_lambda",
            "lambda_pattern",
            "init_weights",
            "module_dropout",
        },
    ),
    parameters=Parameters((_A, _B, _LAMBDA, _W_NORM)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=rank_table,
)
