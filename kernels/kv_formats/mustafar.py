"""A fixed share of each row's channels, the largest ones, as the model computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.kernels.kv_formats.bit_packing import pack, unpack
from polydelta.kernels.kv_formats.codes import finite
from polydelta.kernels.kv_formats.format import KVShape, Parts
from polydelta.kernels.kv_formats.per_token import PerToken
from polydelta.kernels.kv_layout import Section


class Mustafar(PerToken):
    """Mustafar (arXiv:2505.22913): for each token and head the channels of largest magnitude, ties
    to the lower channel, and a bitmap that says which. As many in each row, so that all tokens are
    of one size; the authors keep ties too, and 32 to 287 of the newest tokens whole, where here it
    is the page that is not full, and therefore larger than other formats' pages.

    Of keys that is done with what differs from the page's mean, which is stored once: a few
    channels are large in every key, and would be kept in all of them though they tell no token
    from another.
    """

    by_page = True
    # 112 tokens with half of the channels. The default model's perplexity rises by 2.6 %, with
    # pages of half the size by 3.4 %, and of a quarter, as other formats have them, by 4.7 %.
    native_tokens = 64

    def __init__(self, sparsity: float) -> None:
        """sparsity: the share of channels that are dropped."""
        self.name = f"mustafar-{sparsity * 100:.0f}"
        self.sparsity = sparsity

    def sections(self, tokens: int, shape: KVShape) -> Sequence[Section]:
        means = Section("key_means", shape.dtype, (shape.num_kv_heads, shape.head_dim))
        return [*super().sections(tokens, shape), means]

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        means, rest = centered(keys)
        return {**super().encode(rest, values), "key_means": means}

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        keys, values = super().decode(parts)
        return keys + parts["key_means"].float()[:, None], values

    def _sections(self, tokens: int, shape: KVShape) -> Sequence[Section]:
        heads, head_dim = shape.num_kv_heads, shape.head_dim
        if head_dim % 8:
            raise ValueError(
                f"KV format {self.name} stores a bit for each channel, in whole bytes: head_dim "
                f"{head_dim} is not divisible by 8."
            )
        return [
            Section("_bits", torch.uint8, (tokens, heads, head_dim // 8)),
            Section("s", shape.dtype, (tokens, heads, self._kept(head_dim))),
        ]

    def _encode(self, rows: Tensor) -> Parts:
        rows = finite(rows)
        head_dim = rows.shape[-1]
        # Larger the larger the magnitude is, and then the lower the channel: no two are the same.
        order = rows.abs().float().view(torch.int32).long() * head_dim
        order -= torch.arange(head_dim, device=rows.device)
        largest = order.topk(self._kept(head_dim), dim=-1, sorted=False).indices
        channels = largest.sort(dim=-1).values
        bits = torch.zeros_like(rows, dtype=torch.uint8).scatter_(-1, channels, 1)
        return {"_bits": pack(bits, 1), "s": rows.gather(-1, channels)}

    def _decode(self, parts: Parts) -> Tensor:
        bits, kept = unpack(parts["_bits"], 1), parts["s"].float()
        # How many kept channels there are up to each. Places that no token was stored in may have
        # any number of bits.
        places = (bits.cumsum(-1) - 1).clamp_(0, kept.shape[-1] - 1)
        return kept.gather(-1, places).where(bits > 0, 0.0)

    def _kept(self, head_dim: int) -> int:
        """Channels of a row that stay."""
        return head_dim - int(self.sparsity * head_dim)


def centered(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Each page's mean `[pages, kv_heads, head_dim]`, and what the keys are beside it `[pages,
    tokens, kv_heads, head_dim]`, both of the keys' dtype."""
    keys = finite(keys)
    # In float64, where the order of a sum of half-precision numbers makes no difference as long as
    # they are not 2^40 times as large as others.
    means = (keys.double().sum(1) / keys.shape[1]).float().to(keys.dtype)
    return means, (keys.float() - means.float()[:, None]).to(keys.dtype)
