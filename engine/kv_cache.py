"""Block tables and the prefix cache: which pages hold the KV of which tokens. Imports no torch.

A full block is known by its hash (`block_hashes.py`).

Blocks depend on each other: one that is known is found only behind all before it in its chain.
So whoever uses a block uses those before it too, and one that leaves takes along those behind it,
which nobody uses then. Mostly these have left already: the end of a chain is retired first, and its
blocks are found no more often than those before them. But who gives blocks back in the middle, as
it reads them no more, uses those behind them: they stay, and nobody finds them again.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.block_hashes import BlockHashes
from polydelta.engine.blocks import Blocks
from polydelta.engine.cached_block import CachedBlock, KnownBlocks, PrefixCacheStats
from polydelta.engine.eviction import CostModel, EvictionReason
from polydelta.engine.host_pages import DistantPages
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.pool import PagePool
from polydelta.engine.sequence import GIVEN_BACK, Sequence


@dataclass
class KVCache:
    """Pages of running sequences and of prefixes worth keeping."""

    pool: PagePool
    block_size: int
    costs: CostModel
    prefix_caching: bool = True
    # Whether an adapter's version was deleted: what it made is worthless, and goes first of all.
    is_gone: Callable[[AdapterRef], bool] = lambda _: False
    rules: KVRules = field(default_factory=KVRules)
    # Where blocks go that are seldom read; None where they stay in the pool.
    distant: DistantPages | None = None
    stats: PrefixCacheStats = field(default_factory=PrefixCacheStats)
    # Users of each page in a block table.
    _users: Counter[int] = field(default_factory=Counter)
    _known: KnownBlocks = field(default_factory=KnownBlocks)
    # Slots that were given back, lowest on top; all beyond the highest that was taken are free too.
    _free_slots: list[int] = field(default_factory=list)
    _num_slots: int = 0
    _blocks: Blocks = field(init=False)
    _hashes: BlockHashes = field(init=False)

    def __post_init__(self) -> None:
        self._blocks = Blocks(self.block_size)
        self._hashes = BlockHashes(self.rules, self._blocks)

    @property
    def num_used_pages(self) -> int:
        """Pages in the block table of some sequence."""
        return len(self._users)

    def used_pages(self) -> list[int]:
        return list(self._users)

    def pages_for(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages of the sequence's own that its first `num_tokens` tokens take, with those that were
        given back."""
        return self._blocks.pages(sequence, self.rules.num_places(sequence, num_tokens))

    def most_pages(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages of its own that it takes at any time until it has so many tokens, from none on."""
        most = self._blocks.pages(sequence, self.rules.most_places(sequence, num_tokens))
        read = self.rules.most_read(sequence)
        if read is None:
            return most
        sinks, newest = (count + self.block_size - 1 for count in read)
        # The newest begin anywhere in a page.
        return min(most, sinks // self.block_size + (newest - 1) // self.block_size + 1)

    def pages_to_admit(self, sequence: Sequence, prefix: list[int]) -> int:
        """Pages that must be free or idle for a sequence to enter, and to compute all its tokens so
        far: those of a prefix that nobody uses are idle, and will not be any more."""
        unread = self._blocks.within(
            sequence, self.rules.unread(sequence, self._blocks.tokens_in(sequence, len(prefix)))
        )
        read = [page for index, page in enumerate(prefix) if index not in unread]
        missing = self._blocks.pages(sequence, sequence.num_tokens) - len(prefix)
        idle = len(read) - self.num_used_among(read)
        return min(missing + idle, self.most_pages(sequence, sequence.num_tokens))

    def pages_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages still to be allocated before the first `num_tokens` tokens have a place."""
        return max(0, self.pages_for(sequence, num_tokens) - len(sequence.block_table))

    def find_prefix(self, sequence: Sequence, namespace: str) -> list[int]:
        """Pages that already hold the sequence's first full blocks. Changes nothing.

        At least one token is left out: its logits are needed.
        """
        if not self.prefix_caching:
            return []
        self._hashes.extend(sequence, namespace)
        pages: list[int] = []
        most = min(sequence.num_tokens - 1, self.rules.num_publishable(sequence))
        for block_hash in sequence.block_hashes[: self._blocks.full(sequence, most)]:
            block = self._known.by_hash.get(block_hash)
            if block is None:
                break
            pages.append(block.page)
        while not self.rules.may_begin_at(sequence, self._blocks.tokens_in(sequence, len(pages))):
            pages.pop()
        return pages

    def num_used_among(self, pages: Collection[int]) -> int:
        """How many of these pages are in a block table; host pages do not count."""
        return sum(page in self._users for page in pages)

    def num_own_pages(self, sequence: Sequence, besides: Collection[int] = ()) -> int:
        """Pages that nobody else uses, but for those that are named."""
        return sum(self._users[page] == 1 and page not in besides for page in sequence.block_table)

    def admit(self, sequence: Sequence, prefix: list[int]) -> None:
        """Gives a sequence a slot, and the prefix that `find_prefix` found for it."""
        sequence.slot = heapq.heappop(self._free_slots) if self._free_slots else self._num_slots
        self._num_slots = max(self._num_slots, sequence.slot + 1)
        for page in prefix:
            block = self._known.by_page[page]
            self._use(block)
            block.hits += 1
        sequence.block_table = list(prefix)
        sequence.num_published = len(prefix)
        sequence.num_computed = self._blocks.tokens_in(sequence, len(prefix))
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.stats.queries += sequence.num_prompt_tokens
            self.stats.hits += sequence.num_computed
        self._give_back_unread(sequence)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives a sequence room for its first `num_tokens` tokens; the pool was asked before."""
        pages = self.pool.allocate(self.pages_missing(sequence, num_tokens))
        self._users.update(pages)
        sequence.block_table += pages

    def publish(self, sequence: Sequence, namespace: str) -> None:
        """Makes the sequence's full, computed blocks known to others."""
        if not self.prefix_caching or any(map(self.is_gone, sequence.adapter_refs)):
            return
        self._hashes.extend(sequence, namespace)
        publishable = min(self.rules.num_publishable(sequence), sequence.num_known)
        full = self._blocks.full(sequence, min(sequence.num_computed, publishable))
        for index in range(sequence.num_published, full):
            page, block_hash = sequence.block_table[index], sequence.block_hashes[index]
            known = self._known.by_hash.get(block_hash)
            if known is None:
                # Nobody would find it where the one before it is not known any more.
                if not index or sequence.block_hashes[index - 1] in self._known.by_hash:
                    self._add(sequence, index)
            else:
                # Another sequence was faster with the same block: its page does for both, and is
                # there as long as what this one publishes behind it.
                sequence.block_table[index] = known.page
                self._use(known)
                del self._users[page]
                self.pool.free([page])
        sequence.num_published = max(sequence.num_published, full)

    def drop_evicted(self, sequence: Sequence) -> None:
        """A step that computes some of its tokens was launched: those that it evicts have left."""
        evicted, sequence.num_evicted = sequence.num_evicted, self.rules.num_evicted(sequence)
        if sequence.num_evicted > evicted:
            # With the page of the next token, which would only be taken again.
            staying = self.pages_for(sequence, sequence.num_computed + 1)
            for page in sequence.block_table[staying:]:
                self._leave(page)
            del sequence.block_table[staying:]

    def leaves_pages(self, sequence: Sequence) -> bool:
        """Whether it has blocks that it reads no more, or seldom."""
        table = sequence.block_table
        unread = self._to_leave(sequence, self.rules.unread(sequence, sequence.num_computed))
        if unread and table[unread[-1]] != GIVEN_BACK:
            return True
        if self.distant is None:
            return False
        seldom = self._to_leave(sequence, self.rules.distant(sequence))
        return any(not self.distant.has(table[index]) for index in seldom)

    def leave_pages(self, sequence: Sequence) -> None:
        """Gives back blocks that it reads no more, and moves those that it seldom reads to host
        RAM, as far as there is room: the step that was launched last may still read them in the
        pool, where none writes before it. What others are to find was published."""
        self._give_back_unread(sequence)
        if self.distant is None:
            return
        table = sequence.block_table
        blocks = self._to_leave(sequence, self.rules.distant(sequence))
        near = [index for index in blocks if not self.distant.has(table[index])]
        away = self.distant.take([table[index] for index in near])
        for index, page in zip(near, away, strict=False):
            self._leave(table[index])
            table[index] = page

    def may_be_saved(self, sequence: Sequence) -> bool:
        """Whether a copy of its pages is all that it needs to come back."""
        in_pool = all(page in self._users for page in sequence.block_table)
        return in_pool and self.rules.may_be_saved(sequence)

    def worth_saving(self, sequence: Sequence) -> tuple[int, int]:
        """Of how many tokens there is something in the pool, and in how many of its pages."""
        computed = sequence.num_computed
        if not self.rules.by_page:
            return computed, self.pages_for(sequence, computed) if computed else 0
        pages = self._blocks.full(sequence, computed)
        return self._blocks.tokens_in(sequence, pages), pages

    def release(self, sequence: Sequence, comes_back: bool = False) -> None:
        """Takes a sequence's pages away: published ones are kept while there is room.

        comes_back: it will want them again."""
        # From the end: a block is worthless without those before it, so it must leave first.
        for page in reversed(sequence.block_table):
            self._leave(page, comes_back)
        sequence.block_table = []
        sequence.num_computed = sequence.num_evicted = 0
        if sequence.slot >= 0:
            heapq.heappush(self._free_slots, sequence.slot)
            sequence.slot = -1

    def drop(self, ref: AdapterRef) -> None:
        """A version is gone: frees the blocks that it made and nobody uses."""
        for block in list(self._known.by_hash.values()):
            made_by = any(share.ref == ref for share in block.adapters)
            # One that stood behind another has left with it.
            if made_by and block.hash in self._known.by_hash and block.page not in self._users:
                self.pool.evict(block.hash, EvictionReason.DELETED)

    def _add(self, sequence: Sequence, index: int) -> None:
        """Makes a block of a sequence known; those before it are."""
        page, block_hash = sequence.block_table[index], sequence.block_hashes[index]
        adapters = () if self._hashes.is_of_base(sequence, index) else sequence.adapters
        before = sequence.block_hashes[index - 1] if index else None
        self._known.add(CachedBlock(page, block_hash, adapters, before))

    def _use(self, block: CachedBlock) -> None:
        """One more block table has it."""
        if block.page not in self._users:
            self.pool.revive(block.hash)
        self._users[block.page] += 1

    def _leave(self, page: int, comes_back: bool = False) -> None:
        """One block table has it no more, wherever it lies."""
        if page == GIVEN_BACK:
            return
        if self.distant is not None and self.distant.has(page):
            self.distant.drop(page)
            return
        self._users[page] -= 1
        if self._users[page]:
            return
        del self._users[page]
        block = self._known.by_page.get(page)
        if block is None:
            self.pool.free([page])
            return
        cost = self.costs.prefill_seconds(self.block_size)
        uses = max(block.hits, comes_back)
        self.pool.retire(block.hash, [page], cost, uses, partial(self._forget, block))
        if any(self.is_gone(share.ref) for share in block.adapters):
            self.pool.evict(block.hash, EvictionReason.DELETED)

    def _give_back_unread(self, sequence: Sequence) -> None:
        unread = self.rules.unread(sequence, sequence.num_computed)
        for index in reversed(self._to_leave(sequence, unread)):
            if sequence.block_table[index] == GIVEN_BACK:
                break  # and so were those before it
            self._leave(sequence.block_table[index])
            sequence.block_table[index] = GIVEN_BACK

    def _to_leave(self, sequence: Sequence, positions: range) -> range:
        """Blocks of it that lie there, computed and of tokens that are known: published, where they
        ever are."""
        known = self._blocks.full(sequence, min(sequence.num_computed, sequence.num_known))
        blocks = self._blocks.within(sequence, positions)
        return range(blocks.start, min(blocks.stop, known))

    def _forget(self, block: CachedBlock, reason: EvictionReason) -> None:
        for behind in reversed(self._known.behind(block)):
            if behind.page in self._users:
                self._known.remove(behind)
            else:
                self.pool.evict(behind.hash, reason)
        self._known.remove(block)
        self.stats.evictions[reason] += 1
