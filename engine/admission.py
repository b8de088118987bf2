"""What a sequence takes of the pool when it enters, and gives back later. Imports no torch.

Everything is counted in pages: those of its adapters that are not in the pool or idle there, and
those of all its tokens so far, but for what the prefix cache has of them and somebody uses.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from polydelta.adapters_store.composition import sum_digest
from polydelta.engine.adapter_entry import ResidencyState
from polydelta.engine.block_hashes import BASE_NAMESPACE
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.pools import Pools
from polydelta.engine.preemption import Preemption
from polydelta.engine.residency import Residency
from polydelta.engine.sequence import Sequence

READY = (ResidencyState.ON_HOST, ResidencyState.RESIDENT)


class Admission:
    """Ask (`is_ready`, `problem`, `can_admit`), then `admit`: it cannot fail."""

    def __init__(
        self,
        pools: Pools,
        kv: KVCache,
        residency: Residency[Any, Any],
        preemption: Preemption,
        max_positions: int,
    ) -> None:
        """max_positions: the context window, virtual tokens of adapters included."""
        self._pools = pools
        self._kv = kv
        self._residency = residency
        self._preemption = preemption
        self._max_positions = max_positions

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether all of the sequence's adapters can be had at once; it knows what they do then."""
        if any(self._residency.state(ref) not in READY for ref in sequence.adapter_refs):
            return False
        sequence.learn(map(self._residency.traits, sequence.adapter_refs))
        return True

    def problem(self, sequence: Sequence) -> str | None:
        """Why a sequence that is ready can never run: an empty pool is too small for it, or the
        context window. None where it can."""
        return self._lack_of_pages(sequence) or self._lack_of_positions(sequence)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Pages of the prefix cache that it may begin with."""
        return self._kv.find_prefix(sequence, self.namespace(sequence))

    def can_admit(self, sequence: Sequence, prefix: list[int], freed: int = 0) -> bool:
        """Whether its adapters and all its tokens so far fit beside what is in use.

        freed: pages of KV that will not be in use any more by then."""
        pages = self._kv.pages_to_admit(sequence, prefix)
        adapters = sum(map(self._residency.pages_to_acquire, sequence.adapter_refs))
        return self._pools.can_allocate(pages - freed, adapters)

    def admit(self, sequence: Sequence, prefix: list[int]) -> None:
        """Gives it its adapters, what the prefix cache has of it, and what host RAM has."""
        self._kv.admit(sequence, prefix)
        # Idle ones first: room for the others must not be made of them.
        refs = sorted(sequence.adapter_refs, key=lambda ref: not self._residency.is_resident(ref))
        for ref in refs:
            self._residency.acquire(ref)
        self._lend_prefix(sequence)
        saved = self._preemption.saved_tokens(sequence)
        if saved:
            self._kv.grow(sequence, saved)
        self._preemption.come_back(sequence, prefix)

    def preempt(self, sequence: Sequence) -> None:
        """Takes everything away; what is worth it goes to host RAM."""
        self._preemption.leave(sequence)
        self.release(sequence, comes_back=True)

    def release(self, sequence: Sequence, comes_back: bool = False) -> None:
        """Takes everything away from a sequence that runs."""
        self._kv.release(sequence, comes_back)
        sequence.prefix_pages, sequence.prefix_rest = [], None
        for ref in sequence.adapter_refs:
            self._residency.release(ref)

    def forget(self, sequence: Sequence) -> None:
        """It left for good."""
        self._preemption.forget(sequence)

    def pages_of_own(self, sequence: Sequence, prefix: list[int]) -> int:
        """Pages of KV that can be had once it has left, but for those of a prefix that is wanted
        itself."""
        return self._kv.num_own_pages(sequence, besides=prefix)

    def share(self, sequences: Seq[Sequence]) -> float:
        """What they hold together of the pages that KV may have."""
        pages = {page for sequence in sequences for page in sequence.block_table}
        return self._kv.num_used_among(pages) / self._pools.kv.num_pages

    def grow(self, sequence: Sequence, count: int) -> None:
        """Room for its next `count` tokens; `can_grow` was asked before."""
        self._kv.grow(sequence, sequence.num_computed + count)

    def can_grow(self, sequence: Sequence, count: int) -> bool:
        missing = self._kv.pages_missing(sequence, sequence.num_computed + count)
        return self._pools.can_allocate(missing, 0)

    def next_chunk(self, sequence: Sequence, room: int) -> int:
        """How many of its next tokens a step computes that has room for so many; may be 0."""
        return self._kv.rules.next_chunk(sequence, min(sequence.num_uncomputed, room))

    def launched(self, sequence: Sequence) -> None:
        """A step was launched that computes some of its tokens: takes what it needs no more."""
        self._kv.drop_evicted(sequence)
        if self._kv.leaves_pages(sequence):
            self.publish(sequence)
            self._kv.leave_pages(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Lets others have what a step has computed."""
        self._kv.publish(sequence, self.namespace(sequence))

    def namespace(self, sequence: Sequence) -> str:
        """What tells the KV of its adapters from others'. The name is in it, not the digest alone:
        whoever finds a block may use the adapter that made it."""
        if not sequence.adapters:
            return BASE_NAMESPACE
        return sum_digest(
            [
                (f"{share.ref.id} {self._residency.digest(share.ref)}", share.weight)
                for share in sequence.adapters
            ]
        )

    def _lend_prefix(self, sequence: Sequence) -> None:
        """Shows a sequence the ready-made KV before it, in the pages of its adapter."""
        refs, full = sequence.adapter_refs, sequence.num_prefix_tokens // self._kv.block_size
        pages = [page for ref in refs for page in self._residency.prefix_pages(ref)]
        sequence.prefix_pages = pages[:full]
        sequence.prefix_rest = pages[full] if full < len(pages) else None

    def _lack_of_pages(self, sequence: Sequence) -> str | None:
        refs, prompt = sequence.adapter_refs, sequence.num_prompt_tokens
        adapters = sum(map(self._residency.pages_needed, refs))
        window = self._max_positions - sequence.num_prefix_tokens
        longest = max(prompt + 1, min(prompt + sequence.request.sampling.max_tokens, window))
        pages = self._kv.most_pages(sequence, longest)
        pinned = self._residency.num_pinned_pages(besides=refs)
        if self._pools.fit(pages, adapters + pinned):
            return None
        total = self._pools.num_pages
        split = "" if self._pools.are_one else f", {self._pools.adapters.num_pages} for adapters"
        others = f", {pinned} of which pinned adapters hold" if pinned else ""
        needs = f"{pages + adapters} pages of the pool"
        if adapters:
            needs += f" ({adapters} of them for its adapters)"
        return (
            f"The request needs {needs}, but the pool has {total}{split}{others}: ask for fewer "
            "tokens, or start the server with a larger pool."
        )

    def _lack_of_positions(self, sequence: Sequence) -> str | None:
        virtual, prompt = sequence.num_prefix_tokens, sequence.num_prompt_tokens
        limit = self._max_positions
        if virtual + prompt < limit:
            return None
        return (
            f"The adapter puts {virtual} virtual tokens before the prompt's {prompt}, but the "
            f"context window is {limit} tokens and an answer needs at least one of them: shorten "
            "the prompt, or use an adapter with fewer virtual tokens."
        )
