"""`POST /v1/completions`: prompts continued as they stand."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from polydelta.engine.request import (
    GenerationRequest,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from polydelta.server.openai.collect import WholeChoice, collect
from polydelta.server.openai.generation import Generation, unless_client_leaves
from polydelta.server.openai.kv_select import kv_selection
from polydelta.server.openai.logprobs import CompletionLogprobsWriter
from polydelta.server.openai.prompts import encode_prompts
from polydelta.server.openai.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from polydelta.server.openai.sampling import for_choices, output_limit, sampling_params
from polydelta.server.openai.schemas import CompletionRequest, StreamOptions
from polydelta.server.openai.stream import EventStream, chunk_usage, reason
from polydelta.server.openai.usage import UsageCount
from polydelta.server.service import Service
from polydelta.server.tenants.tenant import Tenant, tenant_of
from polydelta.server.tenants.terms import terms_of
from polydelta.server.tracing import trace_of

if TYPE_CHECKING:  # imports OpenTelemetry, which is an extra
    from polydelta.server.spans import RequestTrace

# OpenAI's own.
DEFAULT_MAX_TOKENS = 16


def completions_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["openai"])

    @router.post("/v1/completions", response_model=Completion)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or many, with the base model or an adapter."""
        reply, generation = await _prepare(service, body, tenant_of(request), trace_of(request))
        if body.stream:
            return EventStream(generation, reply, reply.options, service.metrics.refusals)
        with generation:
            choices = await unless_client_leaves(
                request, collect(generation, len(generation), reply.usage)
            )
        completion = reply.whole(choices)
        return Response(
            completion.model_dump_json(exclude_unset=True), media_type="application/json"
        )

    return router


async def _prepare(
    service: Service, body: CompletionRequest, tenant: Tenant, trace: RequestTrace | None
) -> tuple[CompletionReply, Generation]:
    """The reply to be written, and what it is made of, prompt by prompt. Raises ApiError."""
    arrived = time.monotonic()
    if trace is not None:
        trace.asked("text_completion", body, body.max_tokens)
    terms = terms_of(tenant, body)
    service.check_alive()
    engine = service.engine
    selection = kv_selection(engine, body)
    prompts = await encode_prompts(engine, body.prompt)
    reply = CompletionReply(service, body, prompts)
    choices: list[tuple[Sequence[int], SamplingParams]] = []
    for prompt in prompts:
        limit = output_limit(
            engine, len(prompt), body.max_tokens, "max_tokens", default=DEFAULT_MAX_TOKENS
        )
        sampling = sampling_params(engine, body, limit, body.logprobs)
        choices += [(prompt, choice) for choice in for_choices(sampling, body.n)]
    lease = await service.lease(tenant, body.model, body.weighted_adapters)
    if trace is not None:
        trace.served_by(lease, reply.usage)
    service.metrics.asked(body.n, prompts=len(prompts))
    requests = [
        GenerationRequest(
            f"{reply.id}-{index}",
            prompt,
            choice,
            lease.shares,
            arrived=arrived,
            kv_select=selection,
            **terms,
        )
        for index, (prompt, choice) in enumerate(choices)
    ]
    return reply, Generation(
        engine, requests, lease, service.budgets.of(tenant), body.stream, trace
    )


class CompletionReply:
    """Writes one reply, as a whole body or as chunks."""

    def __init__(
        self, service: Service, body: CompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.usage = UsageCount(prompts, body.n)
        self._created = int(time.time())
        self._body = body
        self.options = body.stream_options or StreamOptions()
        self._prompts = prompts
        self._tokenizer = service.engine.tokenizer
        self._logprobs = [
            CompletionLogprobsWriter(self._tokenizer) for _ in range(len(prompts) * body.n)
        ]

    def whole(self, choices: Sequence[WholeChoice]) -> Completion:
        written = [
            self._choice(
                index,
                self._echo(index) + choice.text,
                choice.logprobs,
                choice.finish_reason,
                choice.stop_reason,
            )
            for index, choice in enumerate(choices)
        ]
        return self._completion(written, {"usage": self.usage.usage()})

    def opening(self) -> list[Completion]:
        if not self._body.echo:
            return []
        return [
            self._chunk([self._choice(index, self._echo(index), (), None, None)])
            for index in range(len(self._logprobs))
        ]

    def chunk(self, index: int, output: RequestOutput) -> Completion:
        choice = self._choice(
            index, output.text, output.logprobs, reason(output), output.stop_reason
        )
        return self._chunk([choice])

    def closing(self) -> list[Completion]:
        if not self.options.include_usage:
            return []
        return [self._completion([], {"usage": self.usage.usage()})]

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return self._completion(choices, chunk_usage(self.options, self.usage))

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._write_logprobs(index, logprobs),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _write_logprobs(
        self, index: int, logprobs: Sequence[TokenLogprob]
    ) -> CompletionLogprobs | None:
        return None if self._body.logprobs is None else self._logprobs[index].write(logprobs)

    def _echo(self, index: int) -> str:
        """The prompt of a choice as text, when the client wants it back."""
        if not self._body.echo:
            return ""
        number = index // self._body.n
        prompt = self._body.prompt[number]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _completion(
        self, choices: list[CompletionChoice], usage: dict[str, Usage | None]
    ) -> Completion:
        return Completion(
            id=self.id,
            object="text_completion",
            created=self._created,
            model=self._body.model,
            choices=choices,
            **usage,
        )
