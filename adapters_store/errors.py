"""What can be wrong with an adapter, said so that its owner can mend it."""

from __future__ import annotations


class AdapterError(Exception):
    """Base of everything that this package raises about an adapter."""


class UnknownAdapterError(AdapterError):
    """No adapter has this id, or not this version of it."""


class InvalidAdapterError(AdapterError):
    """The adapter's files cannot be served as they are; the message names what and why."""
