"""Pages of KV in host RAM: those of preempted sequences, which wait, and those that InfLLM seldom
reads, where they lie.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from polydelta.engine.models.errors import ModelError
from polydelta.engine.pool import PageAllocator
from polydelta.kernels.cpu.memory import lazy_zeros

# Bytes and seconds of one copy.
Observe = Callable[[int, float], None]

# CUDA's name is cudaHostRegisterPortable: locked for all of its contexts.
_PORTABLE = 1
# Copied to and fro at the start, so that the first choice rests on something measured.
_TRIAL_PAGES = 8
_TRIALS = 3


class HostKV:
    """Copies between the pool and host RAM, in the order of what the pool's device has to do.

    A step under way still writes what is copied out behind it, and the next one reads what is
    copied in before it, so on a GPU nobody waits for a copy. There the memory is page-locked, and
    copies are timed by events.
    """

    def __init__(self, storage: Tensor, num_bytes: int, observe: Observe) -> None:
        """storage: the pool, `[layers, pages, page_bytes]` uint8, which nobody uses yet.
        num_bytes: of host RAM, at most. Raises ModelError where the machine has less."""
        layers, pool_pages, page_bytes = storage.shape
        self.page_bytes = layers * page_bytes
        self._storage = storage
        self._observe = observe
        num_pages = num_bytes // self.page_bytes
        if not num_pages:
            raise ModelError(
                f"{num_bytes} bytes of host RAM for KV have no room for a page of it, which takes "
                f"{self.page_bytes}: give it more, or none."
            )
        # A page's layers lie together: one copy each, at 12 GB/s on a CPU. Gathered by index_select
        # it is 1.6 GB/s, and on a GPU takes as much memory again.
        # [host pages, layers, page_bytes]
        self._memory = _host_memory((num_pages, layers, page_bytes))
        if storage.is_cuda:
            _lock(self._memory)
            weakref.finalize(self, _unlock, self._memory).atexit = False
        self._allocator = PageAllocator(num_pages)
        # Copies that are under way on a GPU: bytes, and events before and after.
        self._under_way: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._try_out(min(_TRIAL_PAGES, pool_pages, num_pages))

    @property
    def memory(self) -> Tensor:
        """`[host pages, layers, page_bytes]` uint8."""
        return self._memory

    @property
    def num_pages(self) -> int:
        return self._allocator.num_pages

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def save(self, pages: Sequence[int]) -> list[int]:
        """Copies pages of the pool to host pages, which it returns; `num_free` was asked."""
        saved = self._allocator.take(len(pages))
        self._copy(
            [(self._memory[to], self._page(page)) for to, page in zip(saved, pages, strict=True)]
        )
        return saved

    def restore(self, saved: Sequence[int], pages: Sequence[int]) -> None:
        """Copies host pages to as many pages of the pool, in their order."""
        pairs = zip(saved, pages, strict=True)
        self._copy([(self._page(page), self._memory[source]) for source, page in pairs])

    def drop(self, saved: Sequence[int]) -> None:
        """Host pages are free again. Raises ValueError for one that is free already."""
        self._allocator.give_back(saved)

    def _page(self, page: int) -> Tensor:
        return self._storage[:, page]

    def _copy(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """copies: each to, from."""
        if not copies:
            return
        num_bytes = len(copies) * self.page_bytes
        if not self._storage.is_cuda:
            began = perf_counter()
            for target, source in copies:
                target.copy_(source)
            self._observe(num_bytes, perf_counter() - began)
            return
        self._take_times()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for target, source in copies:
            target.copy_(source, non_blocking=True)
        after.record()
        self._under_way.append((num_bytes, before, after))

    def _take_times(self) -> None:
        """Of copies that are done by now."""
        while self._under_way and self._under_way[0][2].query():
            num_bytes, before, after = self._under_way.popleft()
            self._observe(num_bytes, before.elapsed_time(after) / 1e3)

    def _try_out(self, num_pages: int) -> None:
        """Copies pages of the pool out and back, to measure it."""
        observe = self._observe
        # The first time, the system gives the memory, and a GPU loads its kernels.
        self._observe = _ignore
        for _ in range(1 + _TRIALS):
            pages = range(num_pages)
            saved = self.save(pages)
            self.restore(saved, pages)
            self.drop(saved)
            if self._storage.is_cuda:
                torch.cuda.synchronize(self._storage.device)
            self._take_times()
            self._observe = observe


def _ignore(num_bytes: int, seconds: float) -> None:
    """For copies that say nothing of those to come."""


def _host_memory(shape: tuple[int, ...]) -> Tensor:
    """uint8. Raises ModelError."""
    try:
        return lazy_zeros(shape)
    except OSError as error:
        raise ModelError(_no_room(math.prod(shape))) from error


def _lock(memory: Tensor) -> None:
    """Page-locks memory for copies beside the host. Raises ModelError.

    Memory that torch locks itself is of a power of two bytes, up to twice what was asked for.
    """
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)):
        raise ModelError(_no_room(memory.nbytes))


def _unlock(memory: Tensor) -> None:
    # A copy may be under way.
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _no_room(num_bytes: int) -> str:
    return f"The machine has no {num_bytes} bytes of host RAM for KV: ask for less."
