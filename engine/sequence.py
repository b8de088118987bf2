"""A request on its way through the engine. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence as Seq
from dataclasses import dataclass

from polydelta.adapters_store.composition import Shares
from polydelta.adapters_store.reference import AdapterRef
from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.request import (
    GenerationRequest,
    OutputHandler,
    RequestTimes,
    TokenLogprob,
)

# The activation of adapters that act on no token of a sequence.
NEVER = sys.maxsize
# In the place of a token that a step under way will sample.
UNKNOWN_TOKEN = -1
# In the place of a page that was given back, as nobody reads it any more.
GIVEN_BACK = -1


class Sequence:
    """Tokens of one request, and how far their KV has come. Compared by identity."""

    def __init__(self, request: GenerationRequest, on_output: OutputHandler) -> None:
        self.request = request
        self.on_output = on_output
        # Prompt, then output; the last ones may be UNKNOWN_TOKEN.
        self.token_ids: list[int] = list(request.prompt_token_ids)
        # Tokens that steps under way will sample.
        self.num_unknown = 0
        # Whether it has left the scheduler for good; a step under way may still compute it.
        self.has_left = False
        self.num_prompt_tokens = len(self.token_ids)
        # Whether `learn` was told what its adapters do.
        self.knows_traits = False
        # Virtual tokens of its adapter before the first token.
        self.num_prefix_tokens = 0
        # Index of the first token that its adapters act on.
        self.activation = 0
        # Tokens whose KV is in the pool.
        self.num_computed = 0
        # Prompt tokens that the prefix cache had when the sequence was first admitted.
        self.num_cached: int | None = None
        # Page ids of what its adapter puts before it, while it runs: full pages, read where they
        # are, and the one whose virtual tokens its own first page begins with.
        self.prefix_pages: list[int] = []
        self.prefix_rest: int | None = None
        # Its own page ids. After its adapter's full pages, page i of all holds tokens
        # i * block_size and on, virtual ones counted and those without that were evicted. Some may
        # be GIVEN_BACK, or lie in host RAM: those are beyond the ids of the pool's pages.
        self.block_table: list[int] = []
        # Its number among those that run, from 0 and as low as there is; below 0 while it waits.
        self.slot = -1
        # Of its computed tokens, those whose KV was dropped for good: others moved to their places.
        self.num_evicted = 0
        # Chained hashes of the full blocks so far; see `kv_cache.py`.
        self.block_hashes: list[bytes] = []
        # Blocks that the prefix cache was told of.
        self.num_published = 0
        self.num_preemptions = 0
        # By time.monotonic.
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def adapters(self) -> Shares:
        return self.request.adapters

    @property
    def account(self) -> str:
        """Whom it counts for where the queue is fair: its tenant, or its adapters of any version.
        The bare base model's is ""; no adapter is called as a tenant's."""
        if self.request.tenant:
            return f"tenant {self.request.tenant}"
        return "+".join(share.ref.id for share in self.request.adapters)

    @property
    def adapter_refs(self) -> list[AdapterRef]:
        """Versions that must be in the pool while the sequence runs; each once."""
        return [share.ref for share in self.request.adapters]

    def uses(self, ref: AdapterRef) -> bool:
        return any(share.ref == ref for share in self.request.adapters)

    def learn(self, traits: Iterable[AdapterTraits]) -> None:
        """What each of its adapters does to the whole sequence, known once they are loaded. It
        holds for the sequence's life: what the answer says activates nothing."""
        if self.knows_traits:
            return
        prompt = self.token_ids[: self.num_prompt_tokens]
        each = list(traits)
        self.num_prefix_tokens = sum(one.num_prefix_tokens for one in each)
        self.activation = min((_last_start(prompt, one.invocation) for one in each), default=0)
        self.knows_traits = True

    @property
    def times(self) -> RequestTimes:
        return RequestTimes(
            arrived=self.request.arrived,
            admitted=self.admitted_at,
            first_token=self.first_token_at,
            last_token=self.last_token_at,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_known - self.num_prompt_tokens,
            num_preemptions=self.num_preemptions,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_known(self) -> int:
        return len(self.token_ids) - self.num_unknown

    def expect_token(self) -> None:
        """A step under way will sample the next one."""
        self.token_ids.append(UNKNOWN_TOKEN)
        self.num_unknown += 1

    def learn_token(self, token_id: int) -> None:
        """The first one that is unknown."""
        self.token_ids[self.num_known] = token_id
        self.num_unknown -= 1

    @property
    def num_uncomputed(self) -> int:
        """1 while decoding, more while there is something to prefill."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class ScheduledSequence:
    """One sequence's share of a step: its next `num_tokens` uncomputed tokens, as of the time when
    the step was scheduled."""

    def __init__(self, sequence: Sequence, num_tokens: int) -> None:
        self.sequence = sequence
        self.num_tokens = num_tokens
        # Index of the first of them, and the one after the last.
        self.start = sequence.num_computed
        self.stop = self.start + num_tokens
        # Whether the step reaches the sequence's last token, so that a new one follows.
        self.samples = self.stop == sequence.num_tokens
        # Whether the sequence had no answer yet: not a decode, nor the recomputation of one that
        # was preempted.
        self.is_prefill = not sequence.num_output_tokens

    @property
    def num_before_activation(self) -> int:
        """How many of them, the first ones, its adapters do not act on."""
        return min(self.num_tokens, max(0, self.sequence.activation - self.start))


@dataclass(frozen=True)
class SampledToken:
    """What the sampler chose for one sequence."""

    token_id: int
    logprob: TokenLogprob | None = None


def _last_start(prompt: list[int], invocation: Seq[int]) -> int:
    """Where the last occurrence of the invocation starts; 0 for none that is asked for."""
    if not invocation:
        return 0
    wanted = list(invocation)
    for start in range(len(prompt) - len(wanted), -1, -1):
        if prompt[start : start + len(wanted)] == wanted:
            return start
    return NEVER


# A step: what to compute, in the order of its rows.
Schedule = Seq[ScheduledSequence]
