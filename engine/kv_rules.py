"""What a format of the KV cache, a selection and a way to prefill ask of the scheduler and of the
block tables. In tokens and positions; `kv_cache.py` makes pages of them. Imports no torch.

Blocks are shared by those who would compute the same KV. Formats are pure functions of a page, so
whoever reads a page reads what it would have written. What is chosen by query changes the KV of
answers only, which then nobody else finds; a window changes all KV alike, and has a namespace of
its own. What evicts tokens shares nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from polydelta.engine.kv_composition import Option, row_of
from polydelta.engine.sequence import ScheduledSequence, Sequence
from polydelta.kernels.kv_selection import (
    BY_QUERY,
    EVICTING,
    FULL,
    H2O,
    InfLLM,
    Selection,
    SnapKV,
    Window,
    XAttention,
)

NATIVE = "native"


@dataclass(frozen=True)
class KVRules:
    """Of one server."""

    # Of requests that ask for none.
    selection: Selection = FULL
    # Of prompts; None reads them as the selection says.
    prefill: XAttention | None = None
    # The name of the format, and whether it encodes whole pages: then what does not fill a page is
    # kept elsewhere.
    kv_format: str = NATIVE
    by_page: bool = False

    def of(self, sequence: Sequence) -> Selection:
        """The selection that a sequence reads with."""
        return sequence.request.kv_select or self.selection

    def of_prompts(self, selection: Selection) -> Selection:
        """What prompts are read with where answers are read with the selection."""
        return self.prefill or (FULL if isinstance(selection, BY_QUERY) else selection)

    def problem(self, sequence: Sequence, max_batch_tokens: int, max_batch_size: int) -> str | None:
        """Why a sequence can never run, whose adapters are known; None where it can."""
        selection = self.of(sequence)
        may_follow = row_of(Option.SELECT, selection.name).virtual_tokens
        if sequence.num_prefix_tokens and not may_follow:
            return (
                f"KV selection {selection} evicts tokens of its own pages only, but the adapter "
                "puts virtual tokens before the prompt, in pages that others read too: use another "
                "selection, or an adapter without virtual tokens."
            )
        least = min(self._least_chunk(selection), sequence.num_prompt_tokens)
        # For the first of those that prefill, beside as many others as there may be.
        room = max(1, max_batch_tokens - max_batch_size + 1)
        if least > room:
            return (
                f"{self.prefill or selection} computes {least} tokens of the prompt at once, but a "
                f"step may have room for {room} only: use another KV selection, or start the "
                "server with more tokens in a step."
            )
        return None

    def namespace(self, sequence: Sequence) -> str:
        """What sets its blocks apart from those of the same tokens and adapters that were computed
        in another way. "" where nothing does."""
        selection = self.of(sequence)
        parts = (
            "" if self.kv_format == NATIVE else self.kv_format,
            str(self.prefill or ""),
            str(selection) if isinstance(selection, Window) else "",
        )
        return "\0".join(parts) if any(parts) else ""

    def num_publishable(self, sequence: Sequence) -> int:
        """Of how many of its first tokens others may have the KV, and it theirs."""
        selection, prompt = self.of(sequence), sequence.num_prompt_tokens
        if isinstance(selection, EVICTING):
            return 0
        if self.prefill is not None:
            return max(0, self._whole_blocks(sequence, self.prefill, prompt))
        return prompt if isinstance(selection, BY_QUERY) else sys.maxsize

    def depends_on(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of its first tokens the KV of the first `num_tokens` depends on, of those that
        may be published."""
        if self.prefill is None:
            return num_tokens
        # Keys are chosen for all queries of a block together, from its first one on.
        return self._whole_blocks(sequence, self.prefill, num_tokens + self.prefill.block - 1)

    def may_begin_at(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether its first tokens may be there already, and computing begin behind them."""
        if self.prefill is None or not num_tokens or num_tokens >= sequence.num_prompt_tokens:
            return True
        return self._whole_blocks(sequence, self.prefill, num_tokens) == num_tokens

    def next_chunk(self, sequence: Sequence, tokens: int) -> int:
        """How many of its next tokens a step computes that has room for `tokens` of them; 0 where
        it must wait for a step with more room."""
        selection = self.of(sequence)
        done, prompt = sequence.num_computed, sequence.num_prompt_tokens
        if isinstance(selection, Window):
            # So that pages which are given back behind a step are not many more than it reads.
            return min(tokens, selection.recent)
        if done >= prompt:
            return 1 if isinstance(selection, H2O) else tokens
        end = min(done + tokens, prompt)
        if isinstance(selection, EVICTING):
            if end < prompt:
                end = min(end, prompt - SnapKV.window)
        elif self.prefill is not None:
            if end < prompt:
                end = self._whole_blocks(sequence, self.prefill, end)
        else:
            return tokens
        return max(0, end - done)

    def parts(self, item: ScheduledSequence) -> list[tuple[int, Selection]]:
        """An item's rows, in their order, in pieces: how many, and what they read."""
        selection = self.of(item.sequence)
        num_prompt = max(0, min(item.stop, item.sequence.num_prompt_tokens) - item.start)
        num_answers = item.num_tokens - num_prompt
        of_prompt = self.of_prompts(selection)
        if of_prompt == selection:
            return [(item.num_tokens, selection)]
        prompt = [(num_prompt, of_prompt)] if num_prompt else []
        if self.prefill is not None:
            # Behind virtual tokens it begins inside of a block, which reads all that is before it.
            virtual, block = item.sequence.num_prefix_tokens, self.prefill.block
            inside = min(num_prompt, -(virtual + item.start) % block)
            pieces = ((inside, FULL), (num_prompt - inside, of_prompt))
            prompt = [(rows, reads) for rows, reads in pieces if rows]
        if isinstance(selection, BY_QUERY):
            return prompt + [(1, selection)] * num_answers
        return prompt + ([(num_answers, selection)] if num_answers else [])

    def num_places(self, sequence: Sequence, num_tokens: int) -> int:
        """Places of KV that its first `num_tokens` tokens take, those that are computed next
        among them."""
        return num_tokens - sequence.num_evicted

    def most_places(self, sequence: Sequence, num_tokens: int) -> int:
        """Places that it takes at any time until it has so many tokens."""
        selection, prompt = self.of(sequence), sequence.num_prompt_tokens
        if not isinstance(selection, EVICTING) or num_tokens <= prompt:
            return num_tokens
        # Its own token, of which h2o evicts one behind each.
        answers = 1 if isinstance(selection, H2O) else num_tokens - prompt
        return max(prompt, selection.kept(prompt) + answers)

    def num_evicted(self, sequence: Sequence) -> int:
        """How many tokens have left their places, after what is computed."""
        selection, prompt = self.of(sequence), sequence.num_prompt_tokens
        if not isinstance(selection, EVICTING) or sequence.num_computed < prompt:
            return 0
        staying = selection.kept(prompt)
        return (sequence.num_computed if isinstance(selection, H2O) else prompt) - staying

    def unread(self, sequence: Sequence, num_computed: int) -> range:
        """Positions that no query reads any more once so many tokens are computed."""
        selection = self.of(sequence)
        if not isinstance(selection, Window):
            return range(0)
        return _between(selection, sequence.num_prefix_tokens + num_computed)

    def distant(self, sequence: Sequence) -> range:
        """Positions that are read now and then only, and may lie in host RAM."""
        selection = self.of(sequence)
        if not isinstance(selection, InfLLM):
            return range(0)
        return _between(selection, sequence.num_prefix_tokens + sequence.num_computed)

    def most_read(self, sequence: Sequence) -> tuple[int, int] | None:
        """Where not all is read: how many positions at the beginning, and how many at the end, a
        step's among them and one whose token is not known yet."""
        selection = self.of(sequence)
        if not isinstance(selection, Window):
            return None
        return selection.sinks, 2 * selection.recent

    def may_be_saved(self, sequence: Sequence) -> bool:
        """Whether its pages are all that there is to it."""
        return not isinstance(self.of(sequence), EVICTING)

    def _least_chunk(self, selection: Selection) -> int:
        """Tokens of a prompt that must have room in a step."""
        if isinstance(selection, EVICTING):
            return SnapKV.window
        return 1 if self.prefill is None else self.prefill.block

    def _whole_blocks(self, sequence: Sequence, prefill: XAttention, num_tokens: int) -> int:
        """Of its first tokens, those in whole blocks; blocks are cut by position."""
        virtual = sequence.num_prefix_tokens
        return (virtual + num_tokens) // prefill.block * prefill.block - virtual


def _between(selection: Window | InfLLM, query: int) -> range:
    """Positions between the first ones and the newest that a query sees, at a position."""
    return range(selection.sinks, max(selection.sinks, query - selection.recent + 1))
