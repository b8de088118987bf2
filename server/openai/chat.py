"""`POST /v1/chat/completions`: the next message of a conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from polydelta.engine.request import GenerationRequest, RequestOutput, TokenLogprob
from polydelta.server.openai.collect import WholeChoice, collect
from polydelta.server.openai.generation import Generation, unless_client_leaves
from polydelta.server.openai.kv_select import kv_selection
from polydelta.server.openai.logprobs import chat_logprobs
from polydelta.server.openai.prompts import encode_chat
from polydelta.server.openai.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Usage,
)
from polydelta.server.openai.sampling import for_choices, output_limit, sampling_params
from polydelta.server.openai.schemas import ChatRequest, StreamOptions
from polydelta.server.openai.stream import EventStream, chunk_usage, reason
from polydelta.server.openai.usage import UsageCount
from polydelta.server.service import Service
from polydelta.server.tenants.tenant import Tenant, tenant_of
from polydelta.server.tenants.terms import terms_of
from polydelta.server.tracing import trace_of

if TYPE_CHECKING:  # imports OpenTelemetry, which is an extra
    from polydelta.server.spans import RequestTrace


def chat_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["openai"])

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, as the base model or as an adapter."""
        reply, generation = await _prepare(service, body, tenant_of(request), trace_of(request))
        if body.stream:
            return EventStream(generation, reply, reply.options, service.metrics.refusals)
        with generation:
            choices = await unless_client_leaves(
                request, collect(generation, len(generation), reply.usage)
            )
        completion = reply.whole(choices)
        return Response(completion.model_dump_json(), media_type="application/json")

    return router


async def _prepare(
    service: Service, body: ChatRequest, tenant: Tenant, trace: RequestTrace | None
) -> tuple[ChatReply, Generation]:
    """The reply to be written, and what it is made of. Raises ApiError."""
    arrived = time.monotonic()
    limit_name = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
    wanted = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    if trace is not None:
        trace.asked("chat", body, wanted)
    terms = terms_of(tenant, body)
    service.check_alive()
    engine = service.engine
    selection = kv_selection(engine, body)
    prompt = await encode_chat(engine, body.messages)
    reply = ChatReply(service, body, prompt)
    limit = output_limit(engine, len(prompt), wanted, limit_name)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_params(engine, body, limit, logprobs)
    lease = await service.lease(tenant, body.model, body.weighted_adapters)
    if trace is not None:
        trace.served_by(lease, reply.usage)
    service.metrics.asked(body.n, prompts=1)
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
        for index, choice in enumerate(for_choices(sampling, body.n))
    ]
    return reply, Generation(
        engine, requests, lease, service.budgets.of(tenant), body.stream, trace
    )


class ChatReply:
    """Writes one reply, as a whole body or as chunks."""

    def __init__(self, service: Service, body: ChatRequest, prompt: Sequence[int]) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.usage = UsageCount([prompt], body.n)
        self._created = int(time.time())
        self._body = body
        self.options = body.stream_options or StreamOptions()
        self._tokenizer = service.engine.tokenizer

    def whole(self, choices: Sequence[WholeChoice]) -> ChatCompletion:
        written = [
            ChatChoice(
                index=index,
                message=ChatMessage(role="assistant", content=choice.text),
                logprobs=self._write_logprobs(choice.logprobs),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(choices)
        ]
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            choices=written,
            usage=self.usage.usage(),
        )

    def opening(self) -> list[ChatChunk]:
        """The role of each choice."""
        roles = [
            ChatChunkChoice(
                index=index,
                delta=ChatDelta(role="assistant", content=""),
                logprobs=None,
                finish_reason=None,
                stop_reason=None,
            )
            for index in range(self._body.n)
        ]
        return [self._chunk([role], chunk_usage(self.options, self.usage)) for role in roles]

    def chunk(self, index: int, output: RequestOutput) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index,
            # An empty delta says that nothing was added, as the last one often does.
            delta=ChatDelta(content=output.text) if output.text else ChatDelta(),
            logprobs=self._write_logprobs(output.logprobs),
            finish_reason=reason(output),
            stop_reason=output.stop_reason,
        )
        return self._chunk([choice], chunk_usage(self.options, self.usage))

    def closing(self) -> list[ChatChunk]:
        if not self.options.include_usage:
            return []
        return [self._chunk([], {"usage": self.usage.usage()})]

    def _write_logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, logprobs) if self._body.logprobs else None

    def _chunk(self, choices: list[ChatChunkChoice], usage: dict[str, Usage | None]) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._body.model,
            choices=choices,
            **usage,
        )
