"""One request at a time on an idle engine: what it costs that its adapter lies further away."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stored_adapters import ALL, StoredAdapters, drop_from_page_cache
from benchmarks.timed_answer import Client, Deadline
from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.adapter_entry import ResidencyState

RANKS, PROMPT_TOKENS = (8, 64), 32
POOL, HOST = "in the pool", "in host RAM"
CACHED, DISK, UPLOADED = "packed, in the page cache", "packed, on disk", "as uploaded, on disk"
MB = 1e6


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second, one thread, measured in this run."""

    # From memory to memory, sizes beyond all caches.
    copy: float
    # From a file that is not in the page cache to memory.
    disk: float


@dataclass
class Tier:
    """Where an adapter of one rank lies when it is asked for."""

    name: str
    rank: int
    # Of the packed form, or of the files as uploaded.
    nbytes: int
    # Nothing can be faster: each byte read once from the disk, and copied once into host RAM
    # (where it comes from disk) and once into the pool.
    floor: float
    seconds: list[float] = field(default_factory=list)
    # Beyond what the same turn took with the adapter in the pool.
    extra: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "tier": self.name,
            "mbytes": round(self.nbytes / MB, 2),
            "first_token_ms": round(statistics.median(self.seconds) * 1e3, 2),
            "extra_ms": round(statistics.median(self.extra) * 1e3, 2),
            "floor_ms": round(self.floor * 1e3, 2),
            "turns": len(self.seconds),
        }


class TierBench:
    """An engine whose pool has room for one adapter of the largest rank, and hardly more: loading
    another one puts the first out of the pool, and leaves it in host RAM."""

    def __init__(self, stored: StoredAdapters) -> None:
        self._stored = stored
        self.refs = {rank: stored.publish(f"tier-{rank}", rank, ALL, seed=rank) for rank in RANKS}
        self._other = stored.publish("tier-other", max(RANKS), ALL, seed=1000)
        # 3 for the prompt and a token; less than the smaller adapter takes.
        pages = stored.pages(self._other) + 6
        self.engine = stored.make_engine(pages, host_bytes=1 << 30, batch_size=4)
        self._client = Client(self.engine, PROMPT_TOKENS)

    def ask(self, ref: AdapterRef) -> float:
        """Seconds to the first token."""
        return self._client.ask(1, (Share(ref),)).wait().first_token

    def put(self, ref: AdapterRef, tier: str) -> None:
        """Takes the adapter to where it is to lie."""
        expected = ResidencyState.ON_DISK
        if tier == POOL:
            self.engine.load_adapter(ref).result()
            expected = ResidencyState.RESIDENT
        elif tier == HOST:
            self.engine.load_adapter(ref).result()
            self.engine.load_adapter(self._other).result()
            expected = ResidencyState.ON_HOST
        else:
            self.engine.evict_adapter(ref).result()
            if tier == UPLOADED:
                shutil.rmtree(self._stored.packed_file(ref).parent)
                drop_from_page_cache(ref.path.iterdir())
            elif tier == DISK:
                drop_from_page_cache([self._stored.packed_file(ref)])
        if (place := self.engine.adapter_place(ref).state) is not expected:
            raise RuntimeError(f"{ref.name} is {place.value}, not {expected.value}.")

    def tiers(self, rank: int, bandwidths: Bandwidths) -> list[Tier]:
        ref = self.refs[rank]
        packed = self._stored.tier.load(ref).nbytes
        uploaded = sum(path.stat().st_size for path in ref.path.iterdir())
        copy, read = packed / bandwidths.copy, packed / bandwidths.disk
        return [
            Tier(POOL, rank, packed, 0.0),
            Tier(HOST, rank, packed, copy),
            Tier(CACHED, rank, packed, 2 * copy),
            Tier(DISK, rank, packed, read + copy),
            Tier(UPLOADED, rank, uploaded, uploaded / bandwidths.disk + copy),
        ]


def measure_tiers(
    stored: StoredAdapters, turns: int, deadline: Deadline, advance: Callable[[], None]
) -> tuple[Bandwidths, list[Tier]]:
    """advance: called after each turn of each rank."""
    bench = TierBench(stored)
    try:
        bandwidths = measure_bandwidths(stored.packed_file(bench.refs[max(RANKS)]))
        tiers = {rank: bench.tiers(rank, bandwidths) for rank in RANKS}
        for turn in range(-1, turns):  # the first warms up
            if turn > 0 and deadline.passed:
                break
            for rank, ref in bench.refs.items():
                resident = 0.0
                for tier in tiers[rank]:
                    bench.put(ref, tier.name)
                    seconds = bench.ask(ref)
                    if tier.name == POOL:
                        resident = seconds
                    if turn >= 0:
                        tier.seconds.append(seconds)
                        tier.extra.append(seconds - resident)
                advance()
    finally:
        bench.engine.shutdown()
    return bandwidths, [tier for some in tiers.values() for tier in some]


def measure_bandwidths(file: Path) -> Bandwidths:
    """file: large enough to be read at the disk's own speed."""
    source, target = np.ones(128 << 20, np.uint8), np.zeros(128 << 20, np.uint8)
    copies, reads = [], []
    for _ in range(5):
        began = time.perf_counter()
        target[:] = source
        copies.append(source.nbytes / (time.perf_counter() - began))
        drop_from_page_cache([file])
        began = time.perf_counter()
        with open(file, "rb", buffering=0) as opened:
            count = opened.readinto(target)
        reads.append((count or 0) / (time.perf_counter() - began))
    return Bandwidths(statistics.median(copies), statistics.median(reads))
