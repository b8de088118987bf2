from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from polydelta.engine.host_kv import HostKV
from polydelta.engine.models.errors import ModelError

LAYERS, PAGES, PAGE_BYTES = 3, 11, 14
BYTES = LAYERS * PAGE_BYTES

Copies = list[tuple[int, float]]


def pool(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, PAGES, PAGE_BYTES)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def host_kv(storage: Tensor, num_bytes: int = 7 * BYTES) -> tuple[HostKV, Copies]:
    """With what it observes of copies that are asked for."""
    copies: Copies = []
    host = HostKV(storage, num_bytes, lambda *copy: copies.append(copy))
    copies.clear()
    return host, copies


@pytest.mark.parametrize("pages", [[4], [7, 0, 3], [10, 9, 2, 1, 8, 6, 5]])
def test_pages_come_back_elsewhere_as_they_left(pages: list[int]) -> None:
    storage = pool()
    before = storage.clone()
    host, _ = host_kv(storage)
    saved = host.save(pages)
    storage[:, pages] = 0
    elsewhere = [(page + 1) % PAGES for page in pages]
    host.restore(saved, elsewhere)
    assert torch.equal(storage[:, elsewhere], before[:, pages])
    others = [page for page in range(PAGES) if page not in {*pages, *elsewhere}]
    assert torch.equal(storage[:, others], before[:, others])


def test_the_last_of_saved_pages_come_back_alone() -> None:
    storage = pool()
    before = storage.clone()
    host, _ = host_kv(storage)
    saved = host.save([5, 8, 1, 2])
    storage.zero_()
    host.restore(saved[2:], [9, 0])
    assert torch.equal(storage[:, [9, 0]], before[:, [1, 2]])
    assert not storage[:, 1:9].any()


def test_pages_of_several_do_not_mix() -> None:
    storage = pool()
    before = storage.clone()
    host, _ = host_kv(storage)
    first, second = host.save([1, 2, 3]), host.save([4, 5])
    host.drop(first)
    third = host.save([6, 7, 8, 9, 10])
    assert host.num_free == 0
    assert not set(second) & set(third)
    storage.zero_()
    host.restore(second, [0, 1])
    host.restore(third, [6, 7, 8, 9, 10])
    assert torch.equal(storage[:, :2], before[:, 4:6])
    assert torch.equal(storage[:, 6:], before[:, 6:])


@pytest.mark.parametrize("rest", [0, 1, BYTES - 1])
def test_no_more_bytes_are_taken_than_were_given(rest: int) -> None:
    host, _ = host_kv(pool(), 4 * BYTES + rest)
    assert (host.num_pages, host.num_free, host.num_used) == (4, 4, 0)
    assert host.page_bytes == BYTES
    assert host._memory.nbytes == 4 * BYTES
    saved = host.save([0, 1, 2])
    assert (host.num_free, host.num_used) == (1, 3)
    host.drop(saved)
    assert (host.num_free, host.num_used) == (4, 0)


def test_less_than_a_page_is_refused_with_both_numbers() -> None:
    with pytest.raises(ModelError, match=rf"^{BYTES - 1} bytes .* which takes {BYTES}: give"):
        HostKV(pool(), BYTES - 1, lambda *copy: None)


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(ModelError, match=r"The machine has no [0-9]+ bytes of host RAM for KV"):
        HostKV(pool(), 1 << 60, lambda *copy: None)


def test_a_page_is_dropped_once() -> None:
    host, _ = host_kv(pool())
    saved = host.save([3, 4])
    host.drop(saved)
    with pytest.raises(ValueError, match="not in use"):
        host.drop(saved)


def test_every_copy_is_measured_in_both_directions() -> None:
    host, copies = host_kv(pool())
    began = time.perf_counter()
    host.restore(host.save([1, 2, 3]), [4, 5, 6])
    host.restore([], [])
    passed = time.perf_counter() - began
    assert [num_bytes for num_bytes, _ in copies] == [3 * BYTES, 3 * BYTES]
    assert 0 < sum(seconds for _, seconds in copies) < passed


@pytest.mark.parametrize("num_pages", [1, 5, 30])
def test_the_first_choice_rests_on_a_trial_that_leaves_no_trace(num_pages: int) -> None:
    storage = pool()
    before = storage.clone()
    copies: Copies = []
    host = HostKV(storage, num_pages * BYTES, lambda *copy: copies.append(copy))
    assert len(copies) == 6
    assert all(seconds > 0 for _, seconds in copies)
    assert torch.equal(storage, before)
    assert host.num_used == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_copies_keep_the_order_of_the_stream_and_nobody_waits() -> None:
    storage = pool().cuda()
    host, copies = host_kv(storage)
    assert host._memory.is_pinned()
    pages, elsewhere = [2, 7, 5], [8, 3, 10]
    torch.cuda._sleep(200_000_000)  # a step under way, about 0.1 s, that writes what is saved
    storage[:, pages] = 77
    under_way = torch.cuda.Event()
    under_way.record()
    saved = host.save(pages)
    storage[:, pages] = 0
    host.restore(saved, elsewhere)
    assert not under_way.query(), "it waited for the step"
    assert copies == []
    torch.cuda.synchronize()
    assert (storage[:, elsewhere] == 77).all()
    host.restore(saved, elsewhere)
    assert [num_bytes for num_bytes, _ in copies] == [3 * BYTES, 3 * BYTES]
    assert all(0 < seconds < 0.05 for _, seconds in copies)
