"""What can be wrong with an adapter, said so that its owner can mend it."""

from __future__ import annotations


class AdapterError(Exception):
    """Base of everything that this package raises about an adapter."""


class UnknownAdapterError(AdapterError):
    """No adapter has this id, or not this version of it."""


class InvalidAdapterError(AdapterError):
    """The adapter's files cannot be served as they are; the message names what and why."""


class CompositionError(AdapterError):
    """Adapters that cannot be added up as asked."""


class InUseError(AdapterError):
    """What was asked for has to wait until nobody uses the adapter any more."""


class StoreError(AdapterError):
    """The store itself cannot do what was asked of it; the message says why, for its operator."""


class TooLargeError(AdapterError):
    """An upload has more bytes or files than this server takes."""
