"""What becomes of the KV of sequences that are preempted. Imports no torch.

By recomputation, it is left to the prefix cache, which keeps what nobody needs the room of; the
rest is computed again. By swapping, it is copied to host RAM as well, where that is measured to be
cheaper, and back when the sequence enters again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from polydelta.engine.eviction import CostModel
from polydelta.engine.host_pages import HostPages
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.preemption_mode import PreemptionMode
from polydelta.engine.sequence import Sequence


class Preemption:
    """By recomputation."""

    def __init__(self) -> None:
        # Preemptions, by what was to become of the sequence's KV.
        self.counts = Counter(dict.fromkeys(PreemptionMode, 0))

    @property
    def num_bytes(self) -> int:
        """Of host RAM that is taken."""
        return 0

    def leave(self, sequence: Sequence) -> None:  # noqa: ARG002
        """A sequence is preempted, and still has its pages."""
        self.counts[PreemptionMode.RECOMPUTE] += 1

    def saved_tokens(self, sequence: Sequence) -> int:  # noqa: ARG002
        """Of one that enters and has what the prefix cache gives it: how many of its first tokens
        will be computed when it has come back; 0 where host RAM adds none."""
        return 0

    def come_back(self, sequence: Sequence, prefix: list[int]) -> None:
        """Any sequence enters. It has pages for its saved tokens; the first ones are `prefix`, what
        the prefix cache gave it."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence left for good while it waited."""


@dataclass(frozen=True)
class _Left:
    """What a preempted sequence had."""

    num_tokens: int
    # Blocks before those that it had alone: they are left to the prefix cache.
    num_shared: int
    num_own: int
    # Host pages of its own blocks; None where they are to be computed again.
    saved: list[int] | None


class Swapping(Preemption):
    """By whichever of both is measured to be cheaper, and by recomputation where host RAM has no
    room: what is saved stays until its sequence comes back or leaves for good.

    Blocks that others use as well are not copied: they are there as long as these run. Should they
    be gone when the sequence comes back, all of it is computed again. So are sequences of which
    pages are missing, or more was kept than pages.
    """

    def __init__(self, kv: KVCache, costs: CostModel, host: HostPages) -> None:
        super().__init__()
        self._kv = kv
        self._costs = costs
        self._host = host
        # Of those that wait.
        self._left: dict[Sequence, _Left] = {}
        # Of the blocks that a preempted sequence had alone, the share that the prefix cache has
        # lost when it comes back: a moving average, of those that are swapped as well.
        self._lost_share = 1.0

    @property
    def num_bytes(self) -> int:
        return self._host.num_used * self._host.page_bytes

    def leave(self, sequence: Sequence) -> None:
        if not self._kv.may_be_saved(sequence):
            super().leave(sequence)
            return
        num_shared = len(sequence.block_table) - self._kv.num_own_pages(sequence)
        # The pages after these were for the step at hand, which it is not part of any more.
        computed, stop = self._kv.worth_saving(sequence)
        own = sequence.block_table[num_shared:stop]
        swaps = 0 < len(own) <= self._host.num_free and self._is_cheaper(len(own))
        saved = self._host.save(own) if swaps else None
        self._left[sequence] = _Left(computed, num_shared, len(own), saved)
        self.counts[PreemptionMode.SWAP if swaps else PreemptionMode.RECOMPUTE] += 1

    def saved_tokens(self, sequence: Sequence) -> int:
        left = self._left.get(sequence)
        if left is None or left.saved is None or sequence.num_published < left.num_shared:
            return 0
        return left.num_tokens

    def come_back(self, sequence: Sequence, prefix: list[int]) -> None:
        saved_tokens = self.saved_tokens(sequence)
        left = self._left.pop(sequence, None)
        if left is None:
            return
        found = len(prefix) - left.num_shared
        if left.num_own:
            lost = 1 - min(max(0, found), left.num_own) / left.num_own
            self._lost_share += 0.1 * (lost - self._lost_share)
        if left.saved is None:
            return
        if saved_tokens:
            missing = left.saved[found:]
            table = sequence.block_table[len(prefix) : len(prefix) + len(missing)]
            self._host.restore(missing, table)
            # The prefix cache may have more: what another sequence has computed meanwhile.
            sequence.num_computed = max(sequence.num_computed, saved_tokens)
        self._host.drop(left.saved)

    def forget(self, sequence: Sequence) -> None:
        left = self._left.pop(sequence, None)
        if left is not None and left.saved is not None:
            self._host.drop(left.saved)

    def _is_cheaper(self, num_pages: int) -> bool:
        """Whether to swap. All pages are copied out, but only those that the prefix cache will have
        lost are copied back, or computed again."""
        lost = num_pages * self._lost_share
        copies = self._costs.swap_seconds(round((num_pages + lost) * self._host.page_bytes))
        return copies < self._costs.prefill_seconds(round(lost * self._kv.block_size))
