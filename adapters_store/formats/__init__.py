"""Parsers from files to the delta algebra."""

from polydelta.adapters_store.formats.reader import read_adapter
from polydelta.adapters_store.formats.registry import FORMATS, Format

__all__ = ["FORMATS", "Format", "read_adapter"]
