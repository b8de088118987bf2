"""Block tables and the prefix cache: which pages hold the KV of which tokens. Imports no torch.

A full block is known by a hash chained over all tokens up to its end, and over the name and digest
of the adapter version that computes each block, so that no two variants ever share KV, a new
version under an old name finds nothing of the old one, and whoever finds a block may use the
adapter that made it. A request's salt sets it apart from those with other salts. Blocks before the
token from which an activated LoRA acts are the base's, and shared with it.

Blocks depend on each other: one that is known is found only behind all before it in its chain.
So whoever uses a block uses those before it too, and one that leaves takes along those behind it,
which nobody uses then. Mostly these have left already: the end of a chain is retired first, and its
blocks are found no more often than those before them.

Where an adapter puts n virtual tokens before the sequence, the first n % block_size places of the
sequence's first page are theirs, copied from the adapter's pages. They need no hash of their own:
the adapter's digest stands for them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

from polydelta.adapters_store.composition import Shares
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.eviction import CostModel, EvictionReason
from polydelta.engine.pool import PagePool
from polydelta.engine.sequence import Sequence

BASE_NAMESPACE = "base"

HASH_BYTES = 16


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
class PrefixCacheStats:
    """What was asked of the prefix cache, and what it lost."""

    # Prompt tokens asked for, and found.
    queries: int = 0
    hits: int = 0
    # Blocks, by why they left.
    evictions: Counter[EvictionReason] = field(
        default_factory=lambda: Counter(dict.fromkeys(EvictionReason, 0))
    )


@dataclass
class KVCache:
    """Pages of running sequences and of prefixes worth keeping."""

    pool: PagePool
    block_size: int
    costs: CostModel
    prefix_caching: bool = True
    # Whether an adapter's version was deleted: what it made is worthless, and goes first of all.
    is_gone: Callable[[AdapterRef], bool] = lambda _: False
    stats: PrefixCacheStats = field(default_factory=PrefixCacheStats)
    # Users of each page in a block table.
    _users: Counter[int] = field(default_factory=Counter)
    _by_hash: dict[bytes, CachedBlock] = field(default_factory=dict)
    _by_page: dict[int, CachedBlock] = field(default_factory=dict)

    @property
    def num_used_pages(self) -> int:
        """Pages in the block table of some sequence."""
        return len(self._users)

    def used_pages(self) -> list[int]:
        return list(self._users)

    def pages_for(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages of the sequence's own that its first `num_tokens` tokens take."""
        return -(-(self._shift(sequence) + num_tokens) // self.block_size)

    def pages_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages still to be allocated before the first `num_tokens` tokens have a place."""
        return max(0, self.pages_for(sequence, num_tokens) - len(sequence.block_table))

    def find_prefix(self, sequence: Sequence, namespace: str) -> list[int]:
        """Pages that already hold the sequence's first full blocks. Changes nothing.

        At least one token is left out: its logits are needed.
        """
        if not self.prefix_caching:
            return []
        self._extend_hashes(sequence, namespace)
        pages: list[int] = []
        usable = self._full_blocks(sequence, sequence.num_tokens - 1)
        for block_hash in sequence.block_hashes[:usable]:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            pages.append(block.page)
        return pages

    def idle_among(self, pages: list[int]) -> int:
        """How many of these pages the pool counts as evictable."""
        return sum(1 for page in pages if page not in self._users)

    def num_own_pages(self, sequence: Sequence, besides: Collection[int] = ()) -> int:
        """Pages that nobody else uses, but for those that are named."""
        return sum(self._users[page] == 1 and page not in besides for page in sequence.block_table)

    def admit(self, sequence: Sequence, prefix: list[int]) -> None:
        """Gives a sequence the prefix that `find_prefix` found for it."""
        for page in prefix:
            block = self._by_page[page]
            self._use(block)
            block.hits += 1
        sequence.block_table = list(prefix)
        sequence.num_published = len(prefix)
        sequence.num_computed = self._tokens_in(sequence, len(prefix))
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.stats.queries += sequence.num_prompt_tokens
            self.stats.hits += sequence.num_computed

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives a sequence room for its first `num_tokens` tokens; the pool was asked before."""
        pages = self.pool.allocate(self.pages_missing(sequence, num_tokens))
        self._users.update(pages)
        sequence.block_table += pages

    def publish(self, sequence: Sequence, namespace: str) -> None:
        """Makes the sequence's full, computed blocks known to others."""
        if not self.prefix_caching or any(map(self.is_gone, sequence.adapter_refs)):
            return
        self._extend_hashes(sequence, namespace)
        full = self._full_blocks(sequence, sequence.num_computed)
        for index in range(sequence.num_published, full):
            page, block_hash = sequence.block_table[index], sequence.block_hashes[index]
            known = self._by_hash.get(block_hash)
            if known is None:
                self._add(sequence, index)
            else:
                # Another sequence was faster with the same block: its page does for both, and is
                # there as long as what this one publishes behind it.
                sequence.block_table[index] = known.page
                self._use(known)
                del self._users[page]
                self.pool.free([page])
        sequence.num_published = full

    def release(self, sequence: Sequence, comes_back: bool = False) -> None:
        """Takes a sequence's pages away: published ones are kept while there is room.

        comes_back: it will want them again."""
        # From the end: a block is worthless without those before it, so it must leave first.
        for page in reversed(sequence.block_table):
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            block = self._by_page.get(page)
            if block is None:
                self.pool.free([page])
            else:
                cost = self.costs.prefill_seconds(self.block_size)
                forget = partial(self._forget, block)
                uses = max(block.hits, comes_back)
                self.pool.retire(block.hash, [page], cost, uses, forget)
                if any(self.is_gone(share.ref) for share in block.adapters):
                    self.pool.evict(block.hash, EvictionReason.DELETED)
        sequence.block_table = []
        sequence.num_computed = 0

    def drop(self, ref: AdapterRef) -> None:
        """A version is gone: frees the blocks that it made and nobody uses."""
        for block in list(self._by_hash.values()):
            made_by = any(share.ref == ref for share in block.adapters)
            # One that stood behind another has left with it.
            if made_by and block.hash in self._by_hash and block.page not in self._users:
                self.pool.evict(block.hash, EvictionReason.DELETED)

    def _add(self, sequence: Sequence, index: int) -> None:
        """Makes a block of a sequence known; those before it are."""
        page, block_hash = sequence.block_table[index], sequence.block_hashes[index]
        adapters = () if self._is_of_base(sequence, index) else sequence.adapters
        before = sequence.block_hashes[index - 1] if index else None
        block = CachedBlock(page, block_hash, adapters, before)
        self._by_page[page] = self._by_hash[block_hash] = block
        if before is not None:
            self._by_hash[before].behind.add(block_hash)

    def _use(self, block: CachedBlock) -> None:
        """One more block table has it."""
        if block.page not in self._users:
            self.pool.revive(block.hash)
        self._users[block.page] += 1

    def _forget(self, block: CachedBlock, reason: EvictionReason) -> None:
        for behind in reversed(self._all_behind(block)):
            self.pool.evict(behind, reason)
        del self._by_hash[block.hash], self._by_page[block.page]
        if block.before is not None:
            self._by_hash[block.before].behind.remove(block.hash)
        self.stats.evictions[reason] += 1

    def _all_behind(self, block: CachedBlock) -> list[bytes]:
        """Hashes of the blocks behind one, each after those before it."""
        found = list(block.behind)
        for block_hash in found:  # it grows meanwhile
            found += self._by_hash[block_hash].behind
        return found

    def _shift(self, sequence: Sequence) -> int:
        """Places of the sequence's first page that its adapter's last virtual tokens take."""
        return sequence.num_prefix_tokens % self.block_size

    def _full_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """How many blocks the sequence's first `num_tokens` tokens fill."""
        return (self._shift(sequence) + num_tokens) // self.block_size

    def _tokens_in(self, sequence: Sequence, num_blocks: int) -> int:
        """Tokens of the sequence in its first `num_blocks` blocks, if they are full."""
        return max(0, num_blocks * self.block_size - self._shift(sequence))

    def _first_hash(self, sequence: Sequence) -> bytes:
        """What chains begin with: different salts share no block."""
        salt = sequence.request.cache_salt.encode()
        return hashlib.blake2b(salt, digest_size=HASH_BYTES).digest()

    def _is_of_base(self, sequence: Sequence, block: int) -> bool:
        """Whether the bare base computes the block, with nothing before it that is not its own."""
        last = self._tokens_in(sequence, block + 1)
        return not sequence.num_prefix_tokens and last <= sequence.activation

    def _extend_hashes(self, sequence: Sequence, namespace: str) -> None:
        hashes = sequence.block_hashes
        for block in range(len(hashes), self._full_blocks(sequence, sequence.num_known)):
            start, stop = (self._tokens_in(sequence, count) for count in (block, block + 1))
            base = self._is_of_base(sequence, block)
            # Equal tokens are not enough where the adapter begins to act within the block: where
            # that is depends on the rest of the prompt.
            acts_from = 0 if base else max(0, sequence.activation - start)
            before = hashes[-1] if hashes else self._first_hash(sequence)
            name = (BASE_NAMESPACE if base else namespace).encode() + b"\0"
            content = array("q", [acts_from, *sequence.token_ids[start:stop]]).tobytes()
            block_hash = hashlib.blake2b(before + name + content, digest_size=HASH_BYTES)
            hashes.append(block_hash.digest())
