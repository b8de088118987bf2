"""LoRA-XS (arXiv:2405.17604) and LoRA-SB (arXiv:2411.19557): `dW = scale * B R A`, where only the
small square R was trained.

The authors save the frozen A and B beside R, and read them back. LoRA-SB's come from a gradient, so
they must be there. LoRA-XS's come from the base weight, and a file may do without: the columns of B
are the first r left singular vectors of W then, and `A = B^T W`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.foreign.lora_options import (
    LoraOptions,
    lora_options,
    lora_rules,
)
from polydelta.adapters_store.formats.foreign.truncated_svd import SvdOptions, left_singular_vectors
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, KeyRules, mapping
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

T = TypeVar("T")

_A, _B, _R = "lora_A.weight", "lora_B.weight", "default_lora_latent_mapping.weight"
# So older versions of PEFT write it, which take the adapter's name, `default`, out of all names.
_OLD_R = "_lora_latent_mapping.weight"

# The authors' `reconstr_config.json`, which the config may have under this key.
RECONSTRUCTION = "reconstruct_config"
_RANDOM = "lora_A and lora_B were random then: keep them in the file"
_RECONSTRUCTION_RULES = KeyRules(
    honoured=frozenset({"svd"}),
    # They have one value each; `r_squared` says that there is an R.
    harmless=frozenset({"r_squared", "reconstr_mode", "reconstruction_type"}),
    refused={"half_init_dec": _RANDOM, "replacement_module_random_init": _RANDOM},
)


@dataclass(frozen=True)
class _Settings:
    lora: LoraOptions
    reconstruction: Mapping[str, object]

    def svd(self) -> SvdOptions:
        """Raises InvalidAdapterError when no decomposition gives A and B."""
        _RECONSTRUCTION_RULES.check(self.reconstruction)
        return SvdOptions.of(mapping("svd", self.reconstruction.get("svd")))


@dataclass(frozen=True)
class LatentFormat:
    """A parser that knows R by both its names."""

    format: PeftFormat[_Settings]

    def outline(self, config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        """Raises InvalidAdapterError for all that is wrong whatever the base."""
        return self.format.outline(config, _with_one_name(shapes))

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
    ) -> dict[str, tuple[Delta, ...]]:
        """Module path -> its delta, in float32, with the scale and R folded into B.

        Raises InvalidAdapterError.
        """
        return self.format.read(config, _with_one_name(tensors), layout)


def _with_one_name(tensors: Mapping[str, T]) -> dict[str, T]:
    renamed: dict[str, T] = {}
    for name, tensor in tensors.items():
        if name.endswith(_OLD_R) and not name.endswith(f".{_R}"):
            name = f"{name.removesuffix(_OLD_R)}.{_R}"
        if name in renamed:
            raise InvalidAdapterError(
                f"Tensor {name[:200]!r} is there under both of its names: save the adapter again "
                "from the trained model."
            )
        renamed[name] = tensor
    return renamed


def _settings(config: Config) -> _Settings:
    return _Settings(lora_options(config), mapping(RECONSTRUCTION, config.get(RECONSTRUCTION)))


def _outline_module(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    options = settings.lora
    shapes.check(_R, (options.rank, options.rank), options.why)
    if _A in shapes or _B in shapes:
        shapes.need(_A, _B)
        shapes.check_factors(_A, _B, options.rank, options.why)
    else:
        settings.svd()
    return ModuleOutline(LowRank.kind, options.rank)


def _read_module(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
    options = settings.lora
    if _A in tensors:
        tensors.check_factors(_A, _B, options.rank)
        a, b = tensors[_A], tensors[_B]
    else:
        if options.rank > min(tensors.in_features, tensors.out_features):
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: r is {options.rank}, but {tensors.module!r} has fewer singular "
                "vectors: the adapter was trained on another base."
            )
        weight = tensors.weight()
        b = left_singular_vectors(weight, options.rank, settings.svd())
        a = b.T @ weight
    return (LowRank(a, options.scale * (b @ tensors[_R])),)


def _format(parameters: Parameters) -> LatentFormat:
    return LatentFormat(
        PeftFormat(
            rules=lora_rules("use_rslora", RECONSTRUCTION),
            parameters=parameters,
            outline_module=_outline_module,
            read_module=_read_module,
            targets=linear_layers,
            settings=_settings,
        )
    )


LORA_XS = _format(Parameters(required=(_R,), optional=(_A, _B)))
LORA_SB = _format(Parameters(required=(_A, _B, _R)))
