"""Threads that share the items of a task: each item once, whoever calls, however many there are."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.native import NativeLibrary, NativePool

# Rows of an item, as in layers.c.
ROWS_PER_ITEM = 16


class Turns:
    """Rows that each call turns by a right angle: an item that is done twice, or not at all, points
    elsewhere than the others."""

    def __init__(self, items: int) -> None:
        self._rows = (items - 1) * ROWS_PER_ITEM + 1
        self._x = torch.tensor([1.0, 2.0]).bfloat16().repeat(self._rows, 1)
        self._cos = torch.zeros(self._rows, 2).bfloat16()
        self._sin = torch.tensor([-1.0, 1.0]).bfloat16().repeat(self._rows, 1)
        self._expected = [1.0, 2.0]

    def turn(self, pool: NativePool) -> None:
        rows = self._rows
        pool.call("embed_positions", self._x, 2, self._cos, self._sin, rows, 1, 2)
        low, high = self._expected
        self._expected = [-high, low]

    def check(self) -> None:
        assert torch.equal(self._x, torch.tensor(self._expected).bfloat16().expand(self._rows, 2))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [1, 2, 3, 5, 40])
def test_every_item_is_done_once(decoder_library: NativeLibrary, threads: int, items: int) -> None:
    """Thousands of times in a row, and with pauses in which the threads go to sleep."""
    pool, turns = decoder_library.open_pool(threads), Turns(items)
    for pauses, calls in (False, 700), (True, 20):
        for _ in range(calls):
            turns.turn(pool)
            turns.check()
            if pauses:
                time.sleep(0.001)


def test_many_tasks_without_a_look_between_them(decoder_library: NativeLibrary) -> None:
    pool, sizes = decoder_library.open_pool(3), [Turns(items) for items in (2, 7, 1, 3)]
    for _ in range(1500):
        for turns in sizes:
            turns.turn(pool)
    for turns in sizes:
        turns.check()


def test_two_callers_at_once_do_their_own_items(decoder_library: NativeLibrary) -> None:
    """Whoever finds the pool at work does its task alone."""
    pool, failures = decoder_library.open_pool(3), []

    def work(turns: Turns) -> None:
        try:
            for _ in range(1000):
                turns.turn(pool)
                turns.check()
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(Turns(items),)) for items in (4, 9, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_two_pools_do_not_meet(decoder_library: NativeLibrary) -> None:
    pools = [decoder_library.open_pool(threads) for threads in (2, 3)]
    each = [Turns(5), Turns(6)]
    for _ in range(500):
        for pool, turns in zip(pools, each, strict=True):
            turns.turn(pool)
    for turns in each:
        turns.check()


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_pool_that_nobody_has_any_more_ends_its_threads(
    decoder_library: NativeLibrary,
) -> None:
    """Asleep, and still looking for work."""
    gc.collect()
    before = num_threads()
    for pause in 0.0, 0.02:
        pools = [decoder_library.open_pool(4) for _ in range(3)]
        assert num_threads() == before + 3 * 3
        for pool in pools:
            Turns(4).turn(pool)
        time.sleep(pause)
        del pool, pools
        gc.collect()
        assert num_threads() == before


def test_a_pool_of_one_thread_starts_none(decoder_library: NativeLibrary) -> None:
    before = num_threads()
    pool, turns = decoder_library.open_pool(1), Turns(9)
    assert num_threads() == before
    turns.turn(pool)
    turns.check()


def test_what_it_gives_for_results_stays_while_they_are_held(
    decoder_library: NativeLibrary,
) -> None:
    pool = decoder_library.open_pool(2)
    held: list[Tensor] = [pool.empty(3, 5).fill_(number) for number in range(20)]
    assert held[0].dtype == torch.bfloat16
    assert pool.empty(2, dtype=torch.float32).dtype == torch.float32
    del pool
    gc.collect()
    for number, tensor in enumerate(held):
        assert tensor.tolist() == [[number] * 5] * 3


EXIT = """
import threading, time, torch
from polydelta.kernels.cpu import native
pool = native.load().open_pool(3)
x, y = torch.ones(640, 64).bfloat16(), torch.ones(640, 64).bfloat16()
def compute():
    while True:
        pool.call("rms_norm", y, x, 64, x, 640, 1, 64, 1e-5)
threading.Thread(target=compute, daemon=True).start()
time.sleep(0.05)
"""


def test_a_process_may_end_while_a_thread_computes(
    decoder_library: NativeLibrary, tmp_path: Path
) -> None:
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", EXIT], cwd=tmp_path, timeout=60)
        assert ended.returncode == 0
