"""DyLoRA (arXiv:2210.07558): a LoRA trained so that it can be cut to any lower rank.

As in the authors' repository (huawei-noah/Efficient-NLP), cutting `A [r, in]` and `B [out, r]` to
their first k ranks multiplies each of them by sqrt(r / k). With LoRA's own alpha / r that makes
`y += alpha / k * B[:, :k] (A[:k] x)`. Our own key `polydelta_rank` is k; without it, all r serve.
"""

from __future__ import annotations

from dataclasses import dataclass

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.foreign.lora_options import (
    LoraOptions,
    lora_options,
    lora_rules,
)
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

RANK = "polydelta_rank"

_A, _B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class _Settings:
    trained: LoraOptions
    # At most the trained one.
    rank: int

    @property
    def scale(self) -> float:
        return self.trained.scale * self.trained.rank / self.rank


def _settings(config: Config) -> _Settings:
    trained = lora_options(config)
    chosen = config.get(RANK)
    rank = trained.rank if chosen is None else positive_int(RANK, chosen)
    if rank > trained.rank:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {RANK} is {rank}, but the adapter was trained with r = "
            f"{trained.rank}: set it to a whole number from 1 to {trained.rank}."
        )
    return _Settings(trained, rank)


def _outline_module(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    trained = settings.trained
    shapes.check_factors(_A, _B, trained.rank, trained.why)
    return ModuleOutline(LowRank.kind, settings.rank)


def _read_module(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    tensors.check_factors(_A, _B, settings.trained.rank)
    a, b = tensors[_A][: settings.rank], tensors[_B][:, : settings.rank]
    return (LowRank(a.clone(), b * settings.scale),)


FORMAT = PeftFormat(
    rules=lora_rules(RANK),
    parameters=Parameters((_A, _B)),
    outline_module=_outline_module,
    read_module=_read_module,
    targets=linear_layers,
    settings=_settings,
)
