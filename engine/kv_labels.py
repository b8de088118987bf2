"""A model's label channels for double sparsity, and the file that they are kept in.

    {"polydelta_labels": 1, "model": "...", "fingerprint": "...", "text": "...", "tokens": 8192,
     "channels": [[[0, 5, ...], ...], ...]}

Channels are numbered from 0 in each head, and listed for each layer and kv head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.decoder import base_layout
from polydelta.kernels.kv_selection import DoubleSparsity

VERSION = 1
_REMEDY = "Write one for it with `polydelta calibrate`."


@dataclass(frozen=True, eq=False)
class Labels:
    """What calibration has found for a model."""

    # The name that clients use, and the digest of the model's shapes and name.
    model: str
    fingerprint: str
    # What was read, for people, and how much of it.
    text: str
    tokens: int
    # [layers, kv_heads, labels] int64, ascending.
    channels: Tensor

    def write(self, path: Path) -> None:
        """Raises OSError."""
        fields = {
            "polydelta_labels": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "text": self.text,
            "tokens": self.tokens,
            "channels": self.channels.tolist(),
        }
        path.write_text(json.dumps(fields) + "\n", encoding="utf-8")


def read_labels(path: Path, model: ModelConfig, model_id: str) -> Tensor:
    """`[layers, kv_heads, labels]` int64. Raises ValueError for a file that cannot be read, or that
    is another model's."""
    fields = _fields(path)
    fingerprint = base_layout(model, model_id).fingerprint
    if (found := fields.get("fingerprint")) != fingerprint:
        raise ValueError(
            f"kv_labels {path} has fingerprint {str(found)[:12]!r} of model "
            f"{fields.get('model')!r}, but {model_id!r} has {fingerprint[:12]!r}: each model, of "
            f"each name and shape, has a file of its own. {_REMEDY}"
        )
    count = model.head_dim // DoubleSparsity.label_share
    shape = (model.num_layers, model.num_kv_heads, count)
    try:
        channels = torch.tensor(fields.get("channels"))
        fits = channels.shape == shape and channels.dtype == torch.int64
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fits = False
    # Ascending, so that none is there twice.
    if not fits or not _ascending(channels, model.head_dim):
        layers, heads, _ = shape
        raise ValueError(
            f"kv_labels {path}: channels must be, for each of {layers} layers and {heads} kv heads,"
            f" {count} ascending numbers from 0 to {model.head_dim - 1}. {_REMEDY}"
        )
    return channels


def _ascending(channels: Tensor, head_dim: int) -> bool:
    inside = (channels >= 0) & (channels < head_dim)
    return bool(inside.all() and (channels.diff(dim=-1) > 0).all())


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"kv_labels {path} cannot be opened ({error.strerror}): name a file that `polydelta "
            "calibrate` wrote."
        ) from None
    except ValueError:
        raise ValueError(f"kv_labels {path} is not JSON in UTF-8. {_REMEDY}") from None
    found = fields.get("polydelta_labels") if isinstance(fields, dict) else None
    if found != VERSION:
        raise ValueError(
            f"kv_labels {path} has polydelta_labels {found!r}, not {VERSION}: it is not a file of "
            f"labels that this version reads. {_REMEDY}"
        )
    assert isinstance(fields, dict)
    return fields
