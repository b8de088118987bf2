"""PaCA (arXiv:2503.01905): some input columns of a weight are trained, the others stay.

The authors' fork of PEFT saves `paca_w`, which takes the columns' place: `W[:, indices] = scale *
paca_w`. PEFT's own PaCA saves `paca_delta`, which is added: `W[:, indices] += scale * paca_delta`.
The scale is paca_alpha / r.
"""

from __future__ import annotations

from dataclasses import dataclass

from polydelta.adapters_store.delta import Columns
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.coordinates import positions
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules, number, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_INDICES, _REPLACED, _ADDED = "paca_indices", "paca_w", "paca_delta"

_ONE_SIZE = "modules with sizes of their own are not read in this format: train with one"


@dataclass(frozen=True)
class _Settings:
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def _settings(config: Config) -> _Settings:
    return _Settings(
        positive_int("r", config.get("r")), number("paca_alpha", config.get("paca_alpha"))
    )


def _outline_module(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank = settings.rank
    why = f"r = {rank} in {CONFIG_FILE}"
    if (_REPLACED in shapes) == (_ADDED in shapes):
        raise InvalidAdapterError(
            f"Module {shapes.module!r} must have {_REPLACED} or {_ADDED}, and not both: save the "
            "adapter again from the trained model."
        )
    columns = _REPLACED if _REPLACED in shapes else _ADDED
    shapes.check(_INDICES, (rank,), why)
    shapes.check(columns, (*shapes[columns][:1], rank), why)
    return ModuleOutline(Columns.kind, 0)


def _read_module(settings: _Settings, tensors: ModuleTensors) -> tuple[Columns]:
    name, indices = f"{tensors.module}.{_INDICES}", tensors.raw(_INDICES)
    ascending, order = positions(name, indices, tensors.in_features)
    columns = _REPLACED if _REPLACED in tensors else _ADDED
    tensors.check(columns, (tensors.out_features, len(indices)))
    block = tensors[columns][:, order] * settings.scale
    if columns == _REPLACED:
        block -= tensors.weight()[:, ascending.long()]
    return (Columns(tensors.in_features, ascending, block),)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"paca_alpha", "r"},
        # How the columns were chosen and started, and training.
        harmless={"gradient_accumulation_steps", "init_weights", "megatron_core", "random_seed"},
        refused={
            "alpha_pattern": _ONE_SIZE,
            "rank_pattern": _ONE_SIZE,
            "layer_replication": "it gives the base another number of layers: train without it",
            "megatron_config": "adapters split for Megatron are not served: train without it",
        },
    ),
    parameters=Parameters(required=(_INDICES,), optional=(_REPLACED, _ADDED)),
    outline_module=_outline_module,
    read_module=_read_module,
    targets=linear_layers,
    settings=_settings,
)
