"""How much a tenant may still have: tokens by the minute, and choices at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from polydelta.server.errors import ApiError
from polydelta.server.metrics.refusals import TENANT_CONCURRENCY, TENANT_RATE
from polydelta.server.tenants.tenant import Tenant

SECONDS = 60.0
# When to try again if the end of a request is what is waited for: nobody knows, in seconds.
RETRY_AFTER = 1.0

Clock = Callable[[], float]


class TokenBucket:
    """Fills up evenly, with a minute's tokens at most, and may be in debt: how long an answer gets
    is known only when it has been given. Threads may share it."""

    def __init__(self, tokens_per_minute: int, clock: Clock = time.monotonic) -> None:
        self._capacity = float(tokens_per_minute)
        self._clock = clock
        self._level = self._capacity
        self._filled_at = clock()
        self._lock = threading.Lock()

    def wait(self) -> float:
        """Seconds until a token is there if nothing more is charged; 0.0: there is some now."""
        with self._lock:
            self._fill()
            if self._level > 0:
                return 0.0
            return (1.0 - self._level) * SECONDS / self._capacity

    def charge(self, tokens: int) -> None:
        """Below 0 gives some back."""
        with self._lock:
            self._fill()
            self._level -= tokens

    def _fill(self) -> None:
        now = self._clock()
        gained = (now - self._filled_at) * self._capacity / SECONDS
        self._level = min(self._capacity, self._level + gained)
        self._filled_at = now


class Budget:
    """What one tenant's requests share. `charge` may be called from any thread; all else belongs
    to the event loop."""

    def __init__(self, tenant: Tenant, clock: Clock = time.monotonic) -> None:
        self.tenant = tenant
        limit = tenant.tokens_per_minute
        self._bucket = None if limit is None else TokenBucket(limit, clock)
        # Choices under way.
        self._taken = 0

    def take(self, choices: int, prompt_tokens: int) -> None:
        """Room for a request's choices, until `give_back`; its prompts are charged.

        prompt_tokens: of all choices. Raises ApiError 429 when another try may do better, and 400
        when none will; nothing is taken then.
        """
        most = self.tenant.max_concurrent
        if most is not None and choices > most:
            raise ApiError(
                400,
                f"The request has {choices} choices (its prompts times n), and this key may have "
                f"{most} at a time: split it.",
            )
        if most is not None and self._taken + choices > most:
            raise ApiError(
                429,
                f"This key may have {most} choices at a time; {self._taken} are under way, and the "
                f"request has {choices}: wait until others have ended.",
                reason=TENANT_CONCURRENCY,
                retry_after=RETRY_AFTER,
            )
        if self._bucket is not None:
            if wait := self._bucket.wait():
                raise ApiError(
                    429,
                    f"This key has used up its {self.tenant.tokens_per_minute} tokens a minute: "
                    "try again after the seconds that Retry-After says.",
                    reason=TENANT_RATE,
                    retry_after=wait,
                )
            self._bucket.charge(prompt_tokens)
        self._taken += choices

    def give_back(self, choices: int) -> None:
        """Cannot fail; once for each `take` that did not."""
        self._taken -= choices

    def charge(self, tokens: int) -> None:
        """Tokens of an answer; below 0, of a prompt that was not computed after all."""
        if self._bucket is not None:
            self._bucket.charge(tokens)


class Budgets:
    """One for each tenant; belongs to the event loop."""

    def __init__(self) -> None:
        self._by_name: dict[str, Budget] = {}

    def of(self, tenant: Tenant) -> Budget:
        if tenant.name not in self._by_name:
            self._by_name[tenant.name] = Budget(tenant)
        return self._by_name[tenant.name]
