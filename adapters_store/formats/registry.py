"""The formats that are read. A new one is a parser module and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import (
    bitdelta,
    dylora,
    flylora,
    lora_xs,
    paca,
    peft_adalora,
    peft_beft,
    peft_boft,
    peft_c3a,
    peft_deft,
    peft_delora,
    peft_fourierft,
    peft_frod,
    peft_glora,
    peft_gralora,
    peft_hira,
    peft_hra,
    peft_ia3,
    peft_ln_tuning,
    peft_loha,
    peft_lokr,
    peft_lora,
    peft_miss,
    peft_multitask_prompt,
    peft_oft,
    peft_osf,
    peft_peanut,
    peft_poly,
    peft_prefix,
    peft_prompt,
    peft_psoft,
    peft_randlora,
    peft_road,
    peft_shira,
    peft_supertuning,
    peft_tinylora,
    peft_unilora,
    peft_vblora,
    peft_vera,
    peft_waveft,
    s2ft,
    sft,
    sora,
    trainable_tokens,
)
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config
from polydelta.adapters_store.formats.refusals import REFUSALS
from polydelta.adapters_store.reference import CONFIG_FILE


class Format(Protocol):
    """A parser module. Both functions raise InvalidAdapterError for what cannot be served."""

    def outline(self, config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        """Full module path -> what it gets, without reading numbers or knowing the base."""
        ...

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
    ) -> dict[str, tuple[Delta, ...]]:
        """Full module path -> its deltas, in float32, checked against the base."""
        ...


# By `peft_type` in the config.
FORMATS: Mapping[str, Format] = {
    "LORA": peft_lora,
    "SHIRA": peft_shira,
    "ADALORA": peft_adalora.FORMAT,
    "BEFT": peft_beft.FORMAT,
    "BITDELTA": bitdelta.FORMAT,
    "BOFT": peft_boft.FORMAT,
    "BONE": peft_miss.BONE_FORMAT,
    "C3A": peft_c3a.FORMAT,
    "CARTRIDGE": peft_prefix,
    "CPT": peft_prompt.CPT,
    "DEFT": peft_deft.FORMAT,
    "DELORA": peft_delora.FORMAT,
    "DYLORA": dylora.FORMAT,
    "FLYLORA": flylora.FORMAT,
    "FOURIERFT": peft_fourierft.FORMAT,
    "FROD": peft_frod.FORMAT,
    "GLORA": peft_glora.FORMAT,
    "GRALORA": peft_gralora.FORMAT,
    "HIRA": peft_hira.FORMAT,
    "HRA": peft_hra.FORMAT,
    "IA3": peft_ia3.FORMAT,
    "LN_TUNING": peft_ln_tuning.FORMAT,
    "LOHA": peft_loha.FORMAT,
    "LOKR": peft_lokr.FORMAT,
    "LORA_SB": lora_xs.LORA_SB,
    "LORA_XS": lora_xs.LORA_XS,
    "MISS": peft_miss.FORMAT,
    "MULTITASK_PROMPT_TUNING": peft_multitask_prompt,
    "OFT": peft_oft.FORMAT,
    "OSF": peft_osf.FORMAT,
    "PACA": paca.FORMAT,
    "PEANUT": peft_peanut.FORMAT,
    "POLY": peft_poly.FORMAT,
    "PREFIX_TUNING": peft_prefix,
    "PROMPT_TUNING": peft_prompt.PROMPT_TUNING,
    "PSOFT": peft_psoft.FORMAT,
    "PVERA": peft_vera.PVERA_FORMAT,
    "P_TUNING": peft_prompt.P_TUNING,
    "RANDLORA": peft_randlora.FORMAT,
    "ROAD": peft_road.FORMAT,
    "S2FT": s2ft.FORMAT,
    "SFT": sft.FORMAT,
    "SORA": sora,
    "SUPERTUNING": peft_supertuning.FORMAT,
    "TINYLORA": peft_tinylora.FORMAT,
    "TRAINABLE_TOKENS": trainable_tokens,
    "UNILORA": peft_unilora.FORMAT,
    "VBLORA": peft_vblora.FORMAT,
    "VERA": peft_vera.FORMAT,
    "WAVEFT": peft_waveft.FORMAT,
}


def format_of(config: Config) -> tuple[str, Format]:
    """The format's name and parser. Raises InvalidAdapterError for one that is not read."""
    name = config.get("peft_type")
    if isinstance(name, str) and name in REFUSALS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: peft_type is {name!r}, which is not served: {REFUSALS[name]}."
        )
    if not isinstance(name, str) or name not in FORMATS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: peft_type is {str(name)[:80]!r}, which is not served yet: "
            f"use one of {', '.join(FORMATS)}."
        )
    return name, FORMATS[name]
