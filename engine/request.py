"""A request as the engine sees it, and what it says of it step by step. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain

from polydelta.adapters_store.composition import Shares
from polydelta.kernels.kv_selection import Selection


class ErrorKind(StrEnum):
    """Who can do what about a request that failed."""

    # What was asked for cannot be served: ask for something else.
    REQUEST = "request"
    # The server is to blame.
    SERVER = "server"
    # Its first token would have come after the deadline: ask again later, as below.
    LATE = "late"
    # Too many wait already.
    QUEUE_FULL = "queue_full"


@dataclass(frozen=True)
class RequestError:
    """Why a request ended without an answer."""

    # Fit for the client to read.
    message: str
    kind: ErrorKind = ErrorKind.REQUEST
    # Seconds after which another try may do better; None where that makes no difference.
    retry_after: float | None = None


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words where it has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop. The server has checked the ranges."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    # 0 keeps all tokens.
    top_k: int = 0
    min_p: float = 0.0
    # With a seed, the same request gives the same tokens whatever shares its batch.
    seed: int | None = None
    # Of prompt and output tokens; 1.0 is off (CTRL, arXiv:1909.05858).
    repetition_penalty: float = 1.0
    # Of output tokens only; 0.0 is off.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    # Keep the stop string in the text that is handed out.
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    # How many alternatives to report for each output token; None reports none at all.
    logprobs: int | None = None
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of one output token, and of the most likely ones at its place."""

    token_id: int
    logprob: float
    # (token id, log probability), most likely first.
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestTimes:
    """What became of a request when; by time.monotonic."""

    arrived: float
    # When it first ran; None for one that never did, as below.
    admitted: float | None
    first_token: float | None
    last_token: float | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int

    @property
    def per_output_token(self) -> float | None:
        """Mean seconds from token to token; None where there are not two."""
        if self.first_token is None or self.last_token is None or self.num_output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_output_tokens - 1)


@dataclass(frozen=True)
class RequestOutput:
    """What is new since the last output of this request."""

    request_id: str
    # Text that is safe to hand out; a possible start of a stop string is held back.
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    # Prompt tokens whose KV came from the prefix cache.
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    # The stop string or stop token id that ended it.
    stop_reason: str | int | None = None
    # Set with FinishReason.ERROR.
    error: RequestError | None = None
    # Of the last output only.
    times: RequestTimes | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @staticmethod
    def joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
        """Outputs of one request that follow each other, as one."""
        return replace(
            outputs[-1],
            text="".join(output.text for output in outputs),
            token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
            logprobs=tuple(chain.from_iterable(output.logprobs for output in outputs)),
        )


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate; `n` choices are `n` of these."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    # The adapters whose weighted sum answers; none of them is the bare base model.
    adapters: Shares = ()
    # Whom it counts for where the queue is fair; "" is nobody's, and counts for its adapters.
    tenant: str = ""
    # Of the tenant, against others: twice the weight is twice the tokens.
    weight: float = 1.0
    # Where the queue goes by priority: lower ones first.
    priority: int = 0
    # Prefix blocks are shared between requests of the same salt only.
    cache_salt: str = ""
    # Which tokens its queries read; None for the server's own choice.
    kv_select: Selection | None = None
    # By time.monotonic.
    arrived: float = field(default_factory=time.monotonic)

    def within(self, max_model_len: int) -> GenerationRequest:
        """With `max_tokens` cut to what a context window of so many tokens leaves the answer."""
        room = max(1, max_model_len - len(self.prompt_token_ids))
        params = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))
        return replace(self, sampling=params)


# Called on the engine's thread: must only hand the output on, never wait.
OutputHandler = Callable[[RequestOutput], None]
