"""By what blocks are known in the prefix cache. Imports no torch.

A hash is chained over all tokens that a block's KV depends on, mostly those up to its end, and over
the name and digest of the adapter version that computes each block, so that no two variants ever
share KV, a new version under an old name finds nothing of the old one, and whoever finds a block
may use the adapter that made it. A request's salt sets it apart from those with other salts. Blocks
before the token from which an activated LoRA acts are the base's, and shared with it.

Where an adapter puts n virtual tokens before the sequence, the first n % block_size places of the
sequence's first page are theirs, copied from the adapter's pages. They need no hash of their own:
the adapter's digest stands for them.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass

from polydelta.engine.blocks import Blocks
from polydelta.engine.kv_rules import KVRules
from polydelta.engine.sequence import Sequence

BASE_NAMESPACE = "base"

HASH_BYTES = 16


@dataclass(frozen=True)
class BlockHashes:
    """Of sequences under the same rules; each keeps its own."""

    rules: KVRules
    blocks: Blocks

    def extend(self, sequence: Sequence, namespace: str) -> None:
        """Hashes those of its blocks that may be published and are known since the last time.
        namespace: what tells the KV of its adapters from others'."""
        hashes = sequence.block_hashes
        known = min(sequence.num_known, self.rules.num_publishable(sequence))
        for block in range(len(hashes), self.blocks.full(sequence, known)):
            start, stop = (self.blocks.tokens_in(sequence, count) for count in (block, block + 1))
            base = self.is_of_base(sequence, block)
            # Equal tokens are not enough where the adapter begins to act within the block: where
            # that is depends on the rest of the prompt.
            acts_from = 0 if base else max(0, sequence.activation - start)
            before = hashes[-1] if hashes else self._first(sequence)
            name = (BASE_NAMESPACE if base else namespace).encode() + b"\0"
            tokens = sequence.token_ids[start : self.rules.depends_on(sequence, stop)]
            content = array("q", [acts_from, *tokens]).tobytes()
            block_hash = hashlib.blake2b(before + name + content, digest_size=HASH_BYTES)
            hashes.append(block_hash.digest())

    def is_of_base(self, sequence: Sequence, block: int) -> bool:
        """Whether the bare base computes the block, with nothing before it that is not its own."""
        last = self.rules.depends_on(sequence, self.blocks.tokens_in(sequence, block + 1))
        return not sequence.num_prefix_tokens and last <= sequence.activation

    def _first(self, sequence: Sequence) -> bytes:
        """What chains begin with: different salts share no block, nor do different ways to compute
        the same tokens."""
        salt, namespace = sequence.request.cache_salt, self.rules.namespace(sequence)
        way = hashlib.blake2b(namespace.encode(), digest_size=hashlib.blake2b.PERSON_SIZE)
        return hashlib.blake2b(salt.encode(), digest_size=HASH_BYTES, person=way.digest()).digest()
