"""Fair between tenants, and between the adapters of each. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence as Seq

from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.policies.policy import IsResident, Policy, Share
from polydelta.engine.policies.virtual_counters import VirtualCounters
from polydelta.engine.sequence import Sequence
from polydelta.engine.waiting import Flow, Key

# An output token costs about as much as two of a prompt, as in the paper on virtual counters.
OUTPUT_COST = 2.0
# Tokens by which adapters that are in the pool may get ahead of others.
RESIDENT_BONUS = 128.0

Refs = tuple[AdapterRef, ...]


class Fair(Policy):
    """Virtual token counters on two levels: an account is a tenant, or an adapter where no tenant
    is given; a tenant's adapters have counters among themselves.

    Requests whose adapters are resident get a bonus of some tokens, once: the counters of those who
    use it grow, so that nobody waits longer for it than it takes to compute as many tokens.

    Where one account has more than half of the places or pages, its youngest requests make way for
    accounts that have nobody running, and are preempted before others' are: a flood may fill the
    server, but not for as long as its answers last.
    """

    def __init__(self) -> None:
        self._accounts = VirtualCounters[str]()
        self._weights: dict[str, float] = {}
        # By tenant.
        self._adapters: dict[str, VirtualCounters[Refs]] = {}

    def keys(self, flows: Collection[Flow], is_resident: IsResident) -> Callable[[Flow], Key]:
        # Of two adapters of a tenant, the one that was served more stands as far behind.
        least: dict[str, float] = {}
        for flow in flows:
            if flow.tenant:
                served = self._adapters[flow.tenant][flow.refs]
                least[flow.tenant] = min(served, least.get(flow.tenant, served))

        def key(flow: Flow) -> Key:
            served = self._accounts[flow.account]
            if flow.tenant:
                served += self._adapters[flow.tenant][flow.refs] - least[flow.tenant]
            if is_resident(flow):
                served -= RESIDENT_BONUS
            return served, flow.head.request.arrived

        return key

    def num_ahead(self, sequence: Sequence, flows: Collection[Flow]) -> float:
        """Accounts take turns, as often as their weights say."""
        own, weight = sequence.account, sequence.request.weight
        mine = self._accounts.waiting(own)
        waiting = Counter[str]()
        for flow in flows:
            if flow.account != own:
                waiting[flow.account] += len(flow)
        turns = (mine + 1) / weight
        return mine + sum(
            min(count, turns * self._weights.get(account, 1.0))
            for account, count in waiting.items()
        )

    def queued(self, sequence: Sequence) -> None:
        self._accounts.queued(sequence.account)
        tenant = sequence.request.tenant
        if tenant:
            # Only tenants have weights, and there are few.
            self._weights[sequence.account] = sequence.request.weight
            counters = self._adapters.setdefault(tenant, VirtualCounters())
            counters.queued(tuple(sequence.adapter_refs))

    def left_queue(self, sequence: Sequence) -> None:
        self._accounts.left_queue(sequence.account)
        if tenant := sequence.request.tenant:
            self._adapters[tenant].left_queue(tuple(sequence.adapter_refs))

    def charge(self, sequence: Sequence, prompt_tokens: int, output_tokens: int) -> None:
        cost = (prompt_tokens + OUTPUT_COST * output_tokens) / sequence.request.weight
        self._accounts.charge(sequence.account, cost)
        if tenant := sequence.request.tenant:
            self._adapters[tenant].charge(tuple(sequence.adapter_refs), cost)

    def victim(self, running: Seq[Sequence], share: Share) -> Sequence:
        return next(iter(self.in_the_way(running, share)), running[-1])

    def in_the_way(self, running: Seq[Sequence], share: Share) -> list[Sequence]:
        """The youngest of the account that holds most, as long as it holds more than half. Its last
        one stays: those that it makes way for could not be told from it."""
        accounts: dict[str, list[Sequence]] = {}
        for one in running:
            accounts.setdefault(one.account, []).append(one)
        largest = max(accounts.values(), key=share, default=[])
        found = []
        while len(largest) > 1 and share(largest) > 0.5:
            found.append(largest.pop())
        return found
