"""The blocks that the prefix cache knows, and what is counted of them. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from polydelta.adapters_store.composition import Shares
from polydelta.engine.eviction import EvictionReason


@dataclass
class CachedBlock:
    """A published page: full, computed, and known by its hash."""

    page: int
    hash: bytes
    # Whose it is: it falls with any of these versions.
    adapters: Shares
    # Hashes of the block before it in its chain, and of those known that come next.
    before: bytes | None
    behind: set[bytes] = field(default_factory=set)
    # How often another sequence found it. Whoever made it does not count: most prompts are sent
    # once, and counted they outlived adapters that everybody uses (with room for 20 adapters and
    # traffic over 20, every second request had to load its own).
    hits: int = 0


@dataclass
class KnownBlocks:
    """Those of chains: one that is known has all before it known."""

    by_hash: dict[bytes, CachedBlock] = field(default_factory=dict)
    by_page: dict[int, CachedBlock] = field(default_factory=dict)

    def add(self, block: CachedBlock) -> None:
        """Those before it are known."""
        self.by_page[block.page] = self.by_hash[block.hash] = block
        if block.before is not None:
            self.by_hash[block.before].behind.add(block.hash)

    def remove(self, block: CachedBlock) -> None:
        """Those behind it were removed before."""
        del self.by_hash[block.hash], self.by_page[block.page]
        if block.before is not None:
            self.by_hash[block.before].behind.remove(block.hash)

    def behind(self, block: CachedBlock) -> list[CachedBlock]:
        """Each after those before it."""
        found = [self.by_hash[block_hash] for block_hash in block.behind]
        for each in found:  # it grows meanwhile
            found += [self.by_hash[block_hash] for block_hash in each.behind]
        return found


@dataclass
class PrefixCacheStats:
    """What was asked of the prefix cache, and what it lost."""

    # Prompt tokens asked for, and found.
    queries: int = 0
    hits: int = 0
    # Blocks, by why they left.
    evictions: Counter[EvictionReason] = field(
        default_factory=lambda: Counter(dict.fromkeys(EvictionReason, 0))
    )
