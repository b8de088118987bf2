"""Tokens that leave the KV cache for good: when a prompt is done, and as its answer grows.

Each kv head keeps tokens of its own. So what is left has no common positions any more: it lies in
the first places of the sequence's own pages, and later tokens are written behind it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.kernels.kv_memory import KVKind, KVMemory, decode_tokens
from polydelta.kernels.kv_merging import MergingTokens
from polydelta.kernels.kv_moving import move_tokens
from polydelta.kernels.kv_selecting import precise
from polydelta.kernels.kv_selection import H2O, SnapKV
from polydelta.kernels.ops import SequenceSlice

# Tokens that are decoded and looked at together.
_AT_ONCE = 1024

# Kept of each token that h2o holds for a kv head of a layer, at most: the attention that it has
# received, and its position.
NOTED_BYTES = torch.float64.itemsize + torch.int64.itemsize


@dataclass(eq=False)
class SequenceState:
    """What one layer knows of a sequence; with SnapKV the count alone."""

    # Attention that each token has received, [kv_heads, tokens] float64, dense: of a prompt by
    # position, of an answer by place.
    received: Tensor
    # Of the tokens that stay, by place, [kv_heads, kept] int64, dense; none until the prompt is
    # done.
    positions: Tensor
    # Tokens until now, those that have left included; 0 until the prompt is done.
    count: int = 0


def evicting(slices: Sequence[SequenceSlice]) -> list[SequenceSlice]:
    """Those behind whose attention there is something to do: `Eviction.after`."""
    return [part for part in slices if part.context and _is_evicting(part)]


def _is_evicting(part: SequenceSlice) -> bool:
    match part.selection:
        case H2O():
            return True
        case SnapKV():
            # Nothing for an answer's token: it stays.
            begins = part.context == part.length
            return part.selection.kept(part.prompt) < part.prompt and (begins or part.length > 1)
    return False


class Eviction:
    """SnapKV (arXiv:2404.14469) and H2O (arXiv:2306.14048) over pages that nobody shares, for
    layers without a window.

    Until its prompt is done, a sequence has all of its tokens. Then `selection.kept(prompt)` stay
    for each kv head, in order of position in places 0 and on, in the order of the votes of: SnapKV,
    the prompt's last queries, which are all in the step that completes it; H2O, all queries. With
    H2O one token leaves for each one of the answer, which was written behind those that had stayed:
    of those that are not among the newest, the one that received least. Its place is taken by the
    new one. The attention is computed again, from keys as they are stored, so that it does not
    depend on who attended, and not on how a prompt was cut into steps.

    A query head votes like any other; of equal votes those for lower positions count more.
    """

    def __init__(self, kind: KVKind, device: torch.device) -> None:
        self.kind = kind
        self.device = device
        # By slot and layer.
        self._sequences: defaultdict[int, dict[int, SequenceState]] = defaultdict(dict)

    def after(self, part: SequenceSlice, layer: int, memory: KVMemory, queries: Tensor) -> None:
        """What follows a slice's attention. queries: `[length, heads, head_dim]`, the slice's.

        A sequence begins at position 0; with H2O an answer's slices have one row. Raises ValueError
        for layers with a window, and for H2O where the format is by page: each token of an answer
        would encode a page again.
        """
        self._check(part)
        if part.context == part.length:
            tokens = part.prompt if isinstance(part.selection, H2O) else 0
            shape = (self.kind.shape.num_kv_heads, tokens)
            received = torch.zeros(shape, dtype=torch.float64, device=self.device)
            self._sequences[part.slot][layer] = SequenceState(received, received[:, :0].long())
        sequence = self._sequences[part.slot][layer]
        match part.selection:
            case H2O() if sequence.count:
                self.replace(part.selection, sequence, part, memory, queries)
            case H2O():
                sequence.received[:, : part.context] += self.received(part, memory, queries)
                if part.context == part.prompt:
                    sequence.received, sequence.positions = self._shrunk(
                        part.selection, part, memory, sequence.received
                    )
                    sequence.count = part.prompt
            case SnapKV(window=window) if not sequence.count and part.context == part.prompt:
                received = self.received(part, memory, queries[-window:])
                self._shrunk(part.selection, part, memory, received)
                sequence.count = part.prompt

    def forget(self, slot: int) -> None:
        """The slot's sequence has left."""
        self._sequences.pop(slot, None)

    def _check(self, part: SequenceSlice) -> None:
        if self.kind.shape.window is not None:
            raise ValueError(f"{part.selection.name} cannot evict from layers with a window.")
        if isinstance(part.selection, H2O) and self.kind.format.by_page:
            raise ValueError(f"h2o cannot evict from pages of {self.kind.format.name}.")

    def _shrunk(
        self, selection: SnapKV | H2O, part: SequenceSlice, memory: KVMemory, received: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Leaves of a prompt what stays -> the attention that it stands for, and its positions."""
        kept = selection.kept(part.prompt)
        stays = _staying(selection, received, kept)
        positions = _places(stays)
        if kept < part.prompt:
            received = self._merge(part, memory, received, positions, _places(~stays))
        return received, positions

    def replace(
        self,
        selection: H2O,
        sequence: SequenceState,
        part: SequenceSlice,
        memory: KVMemory,
        queries: Tensor,
    ) -> None:
        """The newest token takes the place of one that leaves."""
        assert part.length == 1
        new = torch.full_like(sequence.positions[:, :1], sequence.count)
        positions = torch.cat((sequence.positions, new), 1)
        received = torch.nn.functional.pad(sequence.received, (0, 1))
        received += self.received(part, memory, queries)
        recent = positions > sequence.count - selection.num_recent(part.prompt)
        leaving = received.masked_fill(recent, math.inf).argmin(1, keepdim=True)
        last = received.shape[1] - 1
        staying = torch.arange(last, device=self.device).repeat(len(received), 1)
        staying.scatter_(1, leaving, last)
        sequence.received = self._merge(part, memory, received, staying, leaving)
        sequence.positions = positions.gather(1, staying)
        sequence.count += 1

    def _merge(
        self,
        part: SequenceSlice,
        memory: KVMemory,
        received: Tensor,
        staying: Tensor,
        leaving: Tensor,
    ) -> Tensor:
        """Leaves only the tokens in the places `staying`, `[kv_heads, kept]`, which move to those
        from 0 on -> the attention that they stand for. leaving: `[kv_heads, n]`, the others."""
        merging = MergingTokens(*self._load(memory, part, staying), received.gather(1, staying))
        for some in leaving.split(_AT_ONCE, 1):
            merging.merge(*self._load(memory, part, some), received.gather(1, some))
        keys, values, weights, changed = merging.result()
        move_tokens(self.kind, memory, part, staying, keys, values, changed)
        return weights

    def received(self, part: SequenceSlice, memory: KVMemory, queries: Tensor) -> Tensor:
        """Attention of the slice's last queries, `[n, heads, head_dim]`, to all tokens before them
        and their own, summed over them and over the query heads of a kv head: `[kv_heads, context]`
        float64."""
        shape = self.kind.shape
        positions = torch.arange(part.context - len(queries), part.context, device=self.device)
        group = shape.num_heads // shape.num_kv_heads
        # [kv_heads, group * n, head_dim]
        grouped = precise(queries).unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)
        grouped = grouped / math.sqrt(shape.head_dim)
        positions = positions.repeat(group)[:, None]

        def scores() -> Iterator[Tensor]:
            for tokens in torch.arange(part.context, device=self.device).split(_AT_ONCE):
                keys, _ = self._load(memory, part, tokens.expand(shape.num_kv_heads, -1))
                products = grouped @ keys.to(grouped.dtype).transpose(1, 2)
                yield products.masked_fill(tokens > positions, -math.inf)

        # Once for the softmax's sums and once for the shares: together they are too much to keep.
        totals = torch.stack([each.logsumexp(-1) for each in scores()]).logsumexp(0)[..., None]
        shares = [(each - totals).exp().sum(1, dtype=torch.float64) for each in scores()]
        return torch.cat(shares, 1)

    def _load(self, memory: KVMemory, part: SequenceSlice, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[kv_heads, n, head_dim]` float32 of tokens `[kv_heads, n]`."""
        some = [decode_tokens(self.kind, memory, part, each) for each in tokens.split(_AT_ONCE, 1)]
        keys, values = zip(*some, strict=True)
        return torch.cat(keys, 1), torch.cat(values, 1)


def _staying(selection: SnapKV | H2O, received: Tensor, kept: int) -> Tensor:
    """Which tokens of a prompt stay, `[kv_heads, prompt]` bool, `kept` for each kv head."""
    prompt = received.shape[1]
    match selection:
        case SnapKV(window=newest, kernel=kernel):
            votes = received[:, : prompt - newest]
            votes = torch.nn.functional.avg_pool1d(votes, kernel, 1, kernel // 2)
        case H2O():
            newest = selection.num_recent(prompt)
            votes = received[:, : prompt - newest]
    # Unlike the largest k, this says what becomes of equal ones.
    chosen = votes.sort(dim=1, descending=True, stable=True).indices[:, : kept - newest]
    stays = torch.zeros_like(received, dtype=torch.bool)
    stays[:, prompt - newest :] = True
    return stays.scatter_(1, chosen, True)


def _places(which: Tensor) -> Tensor:
    """`[kv_heads, n]` bool, as many in each -> where they are, ascending, `[kv_heads, m]`."""
    return which.nonzero()[:, 1].view(len(which), -1)
