"""Hugging Face model folders: `config.json` and safetensors, in one file or sharded."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from polydelta.engine.models.config import FAMILIES, ModelConfig, from_hf, token_ids
from polydelta.engine.models.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION_CONFIG = "generation_config.json"


class HfFolder:
    """One model folder; tensors are read from memory-mapped files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = self._read_config()
        self._file_of = self._locate_tensors()
        self._files: dict[str, Any] = {}

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def files(self) -> tuple[Path, ...]:
        """Those that have the tensors."""
        return tuple(self.path / name for name in sorted(set(self._file_of.values())))

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._open(self._file_of[name]).get_tensor(name)
        except SafetensorError as damage:
            raise ModelError(f"Tensor {name!r} cannot be read: {damage}") from None
        return tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
        except Exception as problem:  # the tokenizers library raises plain exceptions
            reason = (str(problem) or type(problem).__name__).splitlines()[0]
            raise ModelError(f"{self.path.name} has no tokenizer to read: {reason}") from None
        return tokenizer

    def eos_token_ids(self) -> tuple[int, ...]:
        """Of the generation config where there is one, else of the config."""
        path = self.path / GENERATION_CONFIG
        if path.is_file():
            ids = token_ids(self._json(path.name).get("eos_token_id"))
            return ids or self.config.eos_token_ids
        return self.config.eos_token_ids

    def raw_config(self) -> dict[str, Any]:
        """`config.json` as it is."""
        return self._json("config.json")

    def _read_config(self) -> ModelConfig:
        raw = self.raw_config()
        if raw.get("quantization_config"):
            raise ModelError(
                f"{self.path.name} is a quantised checkpoint (quantization_config), which is not "
                "supported; use its 16-bit original or a GGUF file."
            )
        if raw.get("model_type") not in FAMILIES:
            return from_hf(raw)  # raises, naming the families that are served
        try:
            # transformers fills in what older config files leave to defaults.
            return from_hf(AutoConfig.from_pretrained(self.path).to_dict())
        except ModelError:
            raise
        except Exception as problem:  # a value of the wrong type fails wherever it is first used
            reason = (str(problem) or type(problem).__name__).splitlines()[0]
            raise ModelError(f"config.json of {self.path.name} cannot be read: {reason}") from None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise ModelError(f"{self.path} holds no {name}; is it a model folder?") from None
        except ValueError as damage:
            raise ModelError(f"{name} is not valid JSON: {damage}") from None
        if not isinstance(value, dict):
            raise ModelError(f"{name} is not a JSON object.")
        return value

    def _locate_tensors(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self.path / INDEX).is_file():
            weight_map = self._json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{INDEX} has no weight_map.")
            for file_name in sorted(set(weight_map.values())):
                if Path(file_name).name != file_name or not (self.path / file_name).is_file():
                    raise ModelError(f"{INDEX} names {file_name!r}, which is not in the folder.")
            return weight_map
        if not (self.path / SINGLE).is_file():
            raise ModelError(f"{self.path} holds no {SINGLE} and no {INDEX}.")
        self._files = {}
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, file_name: str) -> Any:
        if file_name not in self._files:
            try:
                self._files[file_name] = safe_open(self.path / file_name, framework="pt")
            except (SafetensorError, OSError) as damage:
                raise ModelError(f"{file_name} is not readable safetensors: {damage}") from None
        return self._files[file_name]
