"""What an operator may set of how keys and values are kept and read."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings

from polydelta.engine.kv_composition import Option, check_method, in_full, names_of


def _ways(option: Option) -> str:
    return ", ".join(map(in_full, names_of(option)))


class KVSettings(BaseSettings):
    """A part of a server's settings; what goes with what is checked when the engine is built."""

    kv_format: str = Field(
        "native",
        description=f"How keys and values are stored: {_ways(Option.FORMAT)}. What each takes, and"
        " what goes with what, is printed by `polydelta kv-formats`.",
    )
    kv_select: str = Field(
        "full",
        description=f"What is read of the KV cache: {_ways(Option.SELECT)}; numbers may be left"
        " out. Requests may ask for another one where it is safe.",
    )
    prefill: str = Field(
        "full",
        description="What is read of it while prompts are computed:"
        f" {_ways(Option.PREFILL)} (the stride, and the share of the attention that is kept).",
    )
    kv_labels: Path | None = Field(
        None,
        description="File that `polydelta calibrate` wrote, for --kv-select double-sparsity.",
    )

    @field_validator("kv_labels")
    @classmethod
    def file_exists(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError(f"{str(value)!r} is not a file")
        return value

    @field_validator("kv_format", "kv_select", "prefill")
    @classmethod
    def methods_exist(cls, value: str, info: ValidationInfo) -> str:
        check_method(Option(str(info.field_name)), value)
        return value
