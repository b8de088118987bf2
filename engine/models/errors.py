"""What can be wrong with a base model, said in one line."""

from __future__ import annotations


class ModelError(Exception):
    """The model cannot be found, read or served; the message says why and what to do."""
