"""Which of a sequence's tokens lie in which of its blocks. Imports no torch.

A block is what one page holds. An adapter's virtual tokens come first: those that fill pages lie in
the adapter's own, the rest at the beginning of the sequence's first block.
"""

from __future__ import annotations

from dataclasses import dataclass

from polydelta.engine.sequence import Sequence


@dataclass(frozen=True)
class Blocks:
    """Of one size; a sequence's own are counted from its first page."""

    # Tokens.
    size: int

    def pages(self, sequence: Sequence, num_places: int) -> int:
        """How many blocks hold so many places for the sequence's own tokens."""
        return -(-(self._shift(sequence) + num_places) // self.size)

    def full(self, sequence: Sequence, num_tokens: int) -> int:
        """How many blocks the sequence's first `num_tokens` tokens fill."""
        return (self._shift(sequence) + num_tokens) // self.size

    def tokens_in(self, sequence: Sequence, num_blocks: int) -> int:
        """Tokens of the sequence in its first `num_blocks` blocks, if they are full."""
        return max(0, num_blocks * self.size - self._shift(sequence))

    def within(self, sequence: Sequence, positions: range) -> range:
        """The blocks that lie wholly within some positions, virtual ones counted."""
        before = sequence.num_prefix_tokens // self.size
        first = -(-positions.start // self.size) - before
        stop = positions.stop // self.size - before
        return range(max(0, first), max(0, stop))

    def _shift(self, sequence: Sequence) -> int:
        """Places of the sequence's first page that its adapter's last virtual tokens take."""
        return sequence.num_prefix_tokens % self.size
