"""FlyLoRA (arXiv:2510.08396): of a sparse random `h = A x`, each token goes on with the k numbers
that have the largest `|h + d|`: `y += alpha / r * B h`.

Tensors and options are those of the layer in the authors' `flylora.py`. Their fork of PEFT takes
the largest `h + d` instead, and goes on moving d while it answers; its files are not read.
"""

from __future__ import annotations

from dataclasses import dataclass

from polydelta.adapters_store.delta import TopK
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules, number, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_A, _B, _D = "A", "B", "d"


@dataclass(frozen=True)
class _Settings:
    rank: int
    keep: int
    # 0 for twice the rank, as in the authors' code.
    alpha: float

    @property
    def scale(self) -> float:
        return (self.alpha or 2 * self.rank) / self.rank


def _settings(config: Config) -> _Settings:
    rank = positive_int("r", config.get("r"))
    keep = positive_int("k", config.get("k"))
    if keep > rank:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: k is {keep}, but of r = {rank} ranks no more can be kept: set it to "
            "the k of the training."
        )
    alpha = config.get("alpha")
    return _Settings(rank, keep, 0.0 if alpha is None else number("alpha", alpha))


def _outline_module(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank = settings.rank
    why = f"rank {rank} (r in {CONFIG_FILE})"
    shapes.check_factors(_A, _B, rank, why)
    shapes.check(_D, (rank,), why)
    return ModuleOutline(TopK.kind, rank)


def _read_module(settings: _Settings, tensors: ModuleTensors) -> tuple[TopK]:
    tensors.check_factors(_A, _B, settings.rank)
    b = tensors[_B] * settings.scale
    return (TopK(tensors[_A], b, tensors[_D], settings.keep),)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"alpha", "k", "r"},
        # How sparse A was made, and how fast d was trained.
        harmless={"bias_lr", "sparsity_ratio"},
    ),
    parameters=Parameters(
        required=(_A, _B, _D), ignored=("assignment_count", "expected_frequency")
    ),
    outline_module=_outline_module,
    read_module=_read_module,
    targets=linear_layers,
    settings=_settings,
)
