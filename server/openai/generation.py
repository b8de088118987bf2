"""The bridge between the engine's thread and asyncio: the choices of one HTTP request.

engine thread:  on_output --> what has arrived --> call_soon_threadsafe --.
event loop:                                                               '--> take

The loop wakes for every output of a stream, but for a whole body only when a choice has finished:
waking it costs more than anything else that is done for a token. What waits for a slow client is
put together, so that it is never more than a few outputs, and the text in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from fastapi import Request

from polydelta.adapters_store.leases import Lease
from polydelta.engine.request import (
    ErrorKind,
    FinishReason,
    GenerationRequest,
    RequestError,
    RequestOutput,
)
from polydelta.server.errors import ApiError
from polydelta.server.metrics.refusals import LATE, QUEUE_FULL
from polydelta.server.tenants.limits import Budget

if TYPE_CHECKING:  # these import torch, which the routes do not need, and OpenTelemetry, an extra
    from polydelta.engine.engine import Engine
    from polydelta.server.spans import RequestTrace

T = TypeVar("T")


# Nobody reads it but the access log, where proxies write this status for a client that left.
CLIENT_GONE = 499
# Outputs that wait to be taken, of a request with few choices; more of them are put together.
MOST_WAITING = 256
# What a refusal is counted as when the engine could not serve an adapter.
ADAPTER_FAILED = "adapter_failed"
# What somebody else's request would have met as well, whatever it asked for: status, and what it
# is counted as.
TURNED_AWAY = {ErrorKind.LATE: (429, LATE), ErrorKind.QUEUE_FULL: (503, QUEUE_FULL)}
# When such a one may come back if the engine does not know, in seconds.
RETRY_AFTER = 1.0


class Generation:
    """Takes room in the tenant's budget and submits the requests on entry; on exit aborts all that
    have not finished, however it ends, and gives back the room and the adapters' lease.

    Choice `i` is the output of `requests[i]`. Belongs to the event loop that it was entered on.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[GenerationRequest],
        lease: Lease,
        budget: Budget,
        streamed: bool,
        trace: RequestTrace | None = None,
    ) -> None:
        """budget: what prompts and answers are charged to, and choices have room in.
        streamed: outputs are wanted as they come, and not when a choice has finished.
        trace: is told how each choice ended."""
        self._engine = engine
        self._requests = requests
        self._lease = lease
        self._budget = budget
        self._streamed = streamed
        self._trace = trace
        # Choice and output, oldest first; the engine's thread adds to them.
        self._arrived: list[tuple[int, RequestOutput]] = []
        self._lock = threading.Lock()
        # Of more than so many the next are put together. It doubles, so that an output is handled
        # a few times at most, however many choices there are and however long they get.
        self._most_waiting = MOST_WAITING
        # A choice's failure that the next call of `take` tells of.
        self._failed: ApiError | None = None
        # What `take` waits for.
        self._news: asyncio.Future[None] | None = None
        # Choice -> id of the request, while the engine still works on it.
        self._unfinished: dict[int, str] = {}

    def __len__(self) -> int:
        """The number of choices."""
        return len(self._requests)

    def __enter__(self) -> Self:
        """Raises ApiError when the tenant may not have so much, or nothing can be submitted."""
        self._loop = asyncio.get_running_loop()
        prompt_tokens = sum(len(request.prompt_token_ids) for request in self._requests)
        try:
            self._budget.take(len(self), prompt_tokens)
        except ApiError:
            self._lease.release()
            raise
        try:
            for index, request in enumerate(self._requests):
                self._engine.submit(request, partial(self._hand_over, index))
                self._unfinished[index] = request.request_id
        except RuntimeError:
            self.__exit__()
            if self._engine.alive:
                raise
            raise ApiError(503, "The engine has stopped and takes no requests.") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._abort_unfinished()
        self._budget.give_back(len(self))
        # After the aborts: the engine forgets a deleted version only when nobody runs with it.
        self._lease.release()

    async def take(self) -> list[tuple[int, RequestOutput]]:
        """What has come since the last time, choices interleaved; nothing when all have finished.

        Raises ApiError when the engine could not serve one of them.
        """
        while self._unfinished and not self._arrived and self._failed is None:
            self._news = self._loop.create_future()
            await self._news
        with self._lock:
            arrived, self._arrived = self._arrived, []
            self._most_waiting = MOST_WAITING
        outputs: list[tuple[int, RequestOutput]] = []
        for index, output in arrived:
            if output.finished:
                self._unfinished.pop(index, None)
                if self._trace is not None:
                    self._trace.choice_ended(index, output)
            if output.finish_reason is FinishReason.ERROR:
                self._failed = self._failed or self._failure(index, output)
            elif self._failed is None:
                outputs.append((index, output))
        if self._failed is not None and not outputs:
            raise self._failed
        return outputs

    def _hand_over(self, index: int, output: RequestOutput) -> None:
        """On the engine's thread."""
        self._budget.charge(self._cost(index, output))
        with self._lock:
            self._arrived.append((index, output))
            if len(self._arrived) > self._most_waiting:
                self._arrived = _put_together(self._arrived)
                self._most_waiting = max(MOST_WAITING, 4 * len(self._arrived))
        if self._streamed or output.finished:
            # A closed loop is a server that has stopped; nobody waits for the output.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._tell)

    def _cost(self, index: int, output: RequestOutput) -> int:
        """Tokens to pay for; whoever is turned away gets back what the prompt would have cost."""
        turned_away = output.error is not None and output.error.kind in TURNED_AWAY
        prompt_tokens = len(self._requests[index].prompt_token_ids)
        return len(output.token_ids) - (prompt_tokens if turned_away else 0)

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _abort_unfinished(self) -> None:
        for request_id in self._unfinished.values():
            self._engine.abort(request_id)
        self._unfinished.clear()

    def _failure(self, index: int, output: RequestOutput) -> ApiError:
        error = output.error or RequestError("The engine gave no reason.", ErrorKind.SERVER)
        if not self._engine.alive:
            return ApiError(503, error.message)
        if error.kind in TURNED_AWAY:
            status, reason = TURNED_AWAY[error.kind]
            wait = RETRY_AFTER if error.retry_after is None else error.retry_after
            return ApiError(status, error.message, reason=reason, retry_after=wait)
        status = 503 if error.kind is ErrorKind.SERVER else 400
        if not self._requests[index].adapters:
            return ApiError(status, error.message)
        problem = error.message
        if not all(self._budget.tenant.may_use(share.ref.id) for share in self._lease.shares):
            # Whoever may use a composition need not know of its parts.
            problem = "one of its parts cannot."
        message = f"model: {self._lease.name!r} cannot be served: {problem}"
        return ApiError(status, message, "model" if status < 500 else None, reason=ADAPTER_FAILED)


def _put_together(arrived: Sequence[tuple[int, RequestOutput]]) -> list[tuple[int, RequestOutput]]:
    """One output for each choice, and its failure if it failed."""
    pieces: dict[tuple[int, bool], list[RequestOutput]] = {}
    for index, output in arrived:
        key = index, output.finish_reason is FinishReason.ERROR
        pieces.setdefault(key, []).append(output)
    return [(index, RequestOutput.joined(outputs)) for (index, _), outputs in pieces.items()]


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up (ApiError)."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLIENT_GONE, "The client hung up.")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    """Returns when the client hangs up. The body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
