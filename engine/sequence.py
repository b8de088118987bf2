"""A request on its way through the engine. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from polydelta.adapters_store.composition import Shares
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.request import GenerationRequest, OutputHandler, TokenLogprob


class Sequence:
    """Tokens of one request, and how far their KV has come. Compared by identity."""

    def __init__(self, request: GenerationRequest, on_output: OutputHandler) -> None:
        self.request = request
        self.on_output = on_output
        # Prompt, then output.
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        # Tokens whose KV is in the pool.
        self.num_computed = 0
        # Prompt tokens that the prefix cache had when the sequence was first admitted.
        self.num_cached: int | None = None
        # Page ids; page i holds tokens i * block_size and on.
        self.block_table: list[int] = []
        # Chained hashes of the full blocks so far; see `kv_cache.py`.
        self.block_hashes: list[bytes] = []
        # Blocks that the prefix cache was told of.
        self.num_published = 0
        self.num_preemptions = 0

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def adapters(self) -> Shares:
        return self.request.adapters

    @property
    def adapter_refs(self) -> list[AdapterRef]:
        """Versions that must be in the pool while the sequence runs; each once."""
        return [share.ref for share in self.request.adapters]

    def uses(self, ref: AdapterRef) -> bool:
        return any(share.ref == ref for share in self.request.adapters)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

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


@dataclass(frozen=True, eq=False)
class ScheduledSequence:
    """One sequence's share of a step: its next `num_tokens` uncomputed tokens."""

    sequence: Sequence
    num_tokens: int

    @property
    def start(self) -> int:
        """Position of the first of them."""
        return self.sequence.num_computed

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one follows."""
        return self.num_tokens == self.sequence.num_uncomputed


@dataclass(frozen=True)
class SampledToken:
    """What the sampler chose for one sequence."""

    token_id: int
    logprob: TokenLogprob | None = None


# A step: what to compute, in the order of its rows.
Schedule = Seq[ScheduledSequence]
