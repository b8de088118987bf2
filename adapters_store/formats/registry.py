"""The formats that are read. A new one is a parser module and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import trainable_tokens
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.foreign import (
    bitdelta,
    bitfit,
    dylora,
    flylora,
    lora_xs,
    paca,
    s2ft,
    sft,
    sora,
)
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft import (
    adalora,
    beft,
    boft,
    c3a,
    deft,
    delora,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    multitask_prompt,
    oft,
    osf,
    peanut,
    poly,
    prefix,
    prompt,
    psoft,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    unilora,
    vblora,
    vera,
    waveft,
)
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
    "ADALORA": adalora.FORMAT,
    "BEFT": beft.FORMAT,
    "BITDELTA": bitdelta.FORMAT,
    "BITFIT": bitfit,
    "BOFT": boft.FORMAT,
    "BONE": miss.BONE_FORMAT,
    "C3A": c3a.FORMAT,
    "CARTRIDGE": prefix.FORMAT,
    "CPT": prompt.CPT,
    "DEFT": deft.FORMAT,
    "DELORA": delora.FORMAT,
    "DYLORA": dylora.FORMAT,
    "FLYLORA": flylora.FORMAT,
    "FOURIERFT": fourierft.FORMAT,
    "FROD": frod.FORMAT,
    "GLORA": glora.FORMAT,
    "GRALORA": gralora.FORMAT,
    "HIRA": hira.FORMAT,
    "HRA": hra.FORMAT,
    "IA3": ia3.FORMAT,
    "LN_TUNING": ln_tuning.FORMAT,
    "LOHA": loha.FORMAT,
    "LOKR": lokr.FORMAT,
    "LORA": lora,
    "LORA_SB": lora_xs.LORA_SB,
    "LORA_XS": lora_xs.LORA_XS,
    "MISS": miss.FORMAT,
    "MULTITASK_PROMPT_TUNING": multitask_prompt.FORMAT,
    "OFT": oft.FORMAT,
    "OSF": osf.FORMAT,
    "PACA": paca.FORMAT,
    "PEANUT": peanut.FORMAT,
    "POLY": poly.FORMAT,
    "PREFIX_TUNING": prefix.FORMAT,
    "PROMPT_TUNING": prompt.PROMPT_TUNING,
    "PSOFT": psoft.FORMAT,
    "PVERA": vera.PVERA_FORMAT,
    "P_TUNING": prompt.P_TUNING,
    "RANDLORA": randlora.FORMAT,
    "ROAD": road.FORMAT,
    "S2FT": s2ft.FORMAT,
    "SFT": sft.FORMAT,
    "SHIRA": shira.FORMAT,
    "SORA": sora,
    "SUPERTUNING": supertuning.FORMAT,
    "TINYLORA": tinylora.FORMAT,
    "TRAINABLE_TOKENS": trainable_tokens,
    "UNILORA": unilora.FORMAT,
    "VBLORA": vblora.FORMAT,
    "VERA": vera.FORMAT,
    "WAVEFT": waveft.FORMAT,
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
