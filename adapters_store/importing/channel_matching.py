"""Which channel of a base model is which of a fine-tuned one that has them in another order.

A model computes the same whatever the order of its feed-forward channels, of its key-value heads,
and of the query heads that read one key-value head, as long as all weights keep to it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError


def match_channels(name: str, base: Tensor, tuned: Tensor) -> Tensor:
    """For each row of `tuned`, the row of `base` that it is, `[rows]` int64: equal in all of its
    numbers, and taken once. Of rows that are alike the first one is taken, which is as good as any:
    every order that this function allows computes the same.

    base, tuned: [rows, columns]; name: theirs. Raises InvalidAdapterError when there is no such
    order.
    """
    return torch.tensor(_match(name, _keys(base, len(base)), _keys(tuned, len(tuned))))


def match_heads(
    name: str, base: tuple[Tensor, Tensor], tuned: tuple[Tensor, Tensor], num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """As `match_channels`, for heads: the order of the query heads, `[heads]`, and that of the
    key-value heads, `[num_kv_heads]`. Query heads move with the key head that they read.

    base, tuned: the weights of q and k, `[heads * head_dim, hidden]` and
    `[num_kv_heads * head_dim, hidden]`. name: theirs. Raises InvalidAdapterError.
    """
    head_dim = len(base[1]) // num_kv_heads
    num_heads = len(base[0]) // head_dim
    group = num_heads // num_kv_heads

    def keys(weights: tuple[Tensor, Tensor]) -> tuple[list[list[bytes]], list[bytes]]:
        queries, heads = _keys(weights[0], num_heads), _keys(weights[1], num_kv_heads)
        readers = [queries[kv * group : (kv + 1) * group] for kv in range(num_kv_heads)]
        return readers, [key + b"".join(sorted(of)) for key, of in zip(heads, readers, strict=True)]

    base_readers, base_groups = keys(base)
    tuned_readers, tuned_groups = keys(tuned)
    kv_order = _match(name, base_groups, tuned_groups)
    order = [
        kv * group + head
        for kv, readers in zip(kv_order, tuned_readers, strict=True)
        for head in _match(name, base_readers[kv], readers)
    ]
    return torch.tensor(order), torch.tensor(kv_order)


def rows_of(blocks: Tensor, size: int) -> Tensor:
    """An order of blocks as an order of their rows: `[blocks]` -> `[blocks * size]`."""
    return (blocks.unsqueeze(1) * size + torch.arange(size)).flatten()


def _keys(weight: Tensor, blocks: int) -> list[bytes]:
    """A digest of each of equal blocks of rows."""
    # Adding 0 turns -0 into 0, which is the same number with other bits.
    parts = (weight + 0.0).reshape(blocks, -1).numpy()
    return [hashlib.blake2b(part, digest_size=16).digest() for part in parts]


def _match(name: str, base: Sequence[bytes], tuned: Sequence[bytes]) -> list[int]:
    places: defaultdict[bytes, deque[int]] = defaultdict(deque)
    for place, key in enumerate(base):
        places[key].append(place)
    order = [places[key].popleft() if places[key] else None for key in tuned]
    found = [place for place in order if place is not None]
    if len(found) < len(order):
        raise InvalidAdapterError(
            f"{len(order) - len(found)} of {len(order)} in {name} of the tuned model are none of "
            "the base's, in whatever order, and S2FT leaves these weights as they are: give the "
            "base that it was tuned from, in its 16 bits and not quantised. Of a full fine-tune, "
            "`polydelta adapters distill-delta` makes an adapter."
        )
    return found
