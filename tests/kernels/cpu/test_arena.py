"""Memory of results: given again as soon as nobody reads it, and never before."""

from __future__ import annotations

import random
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from polydelta.kernels.cpu.arena import Arena, tensor_at

DTYPES = (torch.bfloat16, torch.float32)


@dataclass(eq=False)
class Held:
    """A tensor, or a view of one, and the byte that all of it was filled with."""

    tensor: Tensor
    byte: int

    def span(self) -> tuple[int, int]:
        start = self.tensor.untyped_storage().data_ptr()
        return start, start + self.tensor.untyped_storage().nbytes()

    def check(self) -> None:
        assert bool((self.tensor.contiguous().view(torch.uint8) == self.byte).all())


def filled(tensor: Tensor, byte: int) -> Held:
    tensor.view(torch.uint8).fill_(byte)
    return Held(tensor, byte)


STEPS = st.one_of(
    st.tuples(
        st.just("take"),
        st.lists(st.integers(1, 9), min_size=1, max_size=3),
        st.sampled_from(DTYPES),
    ),
    st.tuples(st.just("view"), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.just("drop"), st.integers(0, 99), st.none()),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_no_two_live_tensors_share_memory(steps: list[tuple]) -> None:
    arena = Arena()
    # By what they were filled with: a tensor, and views that outlive it.
    held: list[list[Held]] = []
    for number, (what, first, second) in enumerate(steps):
        if what == "take":
            held.append([filled(arena.empty(tuple(first), second), number % 251 + 1)])
            assert held[-1][0].tensor.shape == tuple(first)
            assert held[-1][0].tensor.dtype == second
        elif held and what == "view":
            family = held[first % len(held)]
            whole = family[second % len(family)]
            family.append(Held(whole.tensor[..., : 1 + second % 3], whole.byte))
        elif held:
            family = held[first % len(held)]
            family.pop(0)  # the tensor first, its views later
            if not family:
                held.remove(family)
        for family in held:
            for one in family:
                one.check()
        spans = sorted({one.span() for family in held for one in family})
        assert len({family[0].span() for family in held}) == len(held)
        for (_, stop), (start, _) in pairwise(spans):
            assert stop <= start


def test_freed_memory_is_given_again() -> None:
    arena = Arena()
    first = arena.empty((3, 100), torch.float32)
    address = first.data_ptr()
    del first
    for shape, dtype in ((3, 100), torch.float32), ((2, 50), torch.bfloat16), ((7,), torch.float32):
        again = arena.empty(shape, dtype)
        assert again.data_ptr() == address
        del again
    assert len(arena._blocks) == 1


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    arena = Arena()
    sizes = {count: arena.empty((count,), torch.float32) for count in (100, 10, 1000)}
    addresses = {count: tensor.data_ptr() for count, tensor in sizes.items()}
    sizes.clear()
    # Blocks are powers of two, 64 bytes at 10 numbers.
    for wanted, block in (17, 100), (11, 10), (500, 1000):
        assert arena.empty((wanted,), torch.float32).data_ptr() == addresses[block]
    larger = arena.empty((1025,), torch.float32)
    assert larger.data_ptr() not in addresses.values()


def test_results_that_grow_by_one_number_need_few_blocks() -> None:
    arena = Arena()
    for count in range(1, 3000):
        arena.empty((count,), torch.float32)
    assert len(arena._blocks) == 13  # 4 bytes to 16 KiB, in powers of two


def test_a_view_keeps_the_memory() -> None:
    arena = Arena()
    view = arena.empty((4, 6), torch.bfloat16).fill_(3.0)[1:3, ::2].t()
    others = [arena.empty((4, 6), torch.bfloat16).fill_(5.0) for _ in range(3)]
    assert view.tolist() == [[3.0, 3.0]] * 3
    address = view.untyped_storage().data_ptr()
    assert address not in {other.data_ptr() for other in others}
    del view
    assert arena.empty((4, 6), torch.bfloat16).data_ptr() == address


def test_the_steps_of_a_layer_need_no_new_memory_the_second_time() -> None:
    arena, chance = Arena(), random.Random(0)
    shapes = [(chance.randint(1, 5), chance.randint(1, 300)) for _ in range(30)]

    def step() -> None:
        held: list[Tensor] = []
        for shape in shapes:
            held = [*held[-2:], arena.empty(shape, torch.bfloat16)]

    step()
    blocks = set(arena._blocks)
    for _ in range(5):
        step()
    assert set(arena._blocks) == blocks


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_without_numbers_can_be_had(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = Arena().empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor_at(0, shape, dtype).shape == shape


def test_memory_is_aligned_to_cache_lines() -> None:
    arena = Arena()
    tensors = [arena.empty((count,), torch.bfloat16) for count in (1, 3, 33, 1000)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_what_lasts_of_a_field_of_a_recording() -> None:
    arena = Arena()
    own, foreign = arena.empty((4, 4), torch.bfloat16), torch.zeros(4)
    assert arena.lasting(own) == own.data_ptr()
    assert arena.lasting(own[2:, 1:]) == own.data_ptr() + 2 * (2 * 4 + 1)
    assert arena.lasting(foreign) is foreign
    assert arena.lasting(7) == 7
    assert arena.lasting(None) is None


def test_what_lies_at_an_address_is_read_where_it_lies() -> None:
    numbers = torch.arange(6, dtype=torch.float32)
    seen = tensor_at(numbers.data_ptr(), (2, 3), torch.float32)
    numbers[5] = 9.0
    assert seen.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 9.0]]


def test_a_tensor_may_go_at_the_very_moment_when_memory_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the collector of cycles runs, say, or on another thread."""
    arena = Arena()
    large, held = arena.empty((100,), torch.float32), [arena.empty((1,), torch.float32)]
    address = large.data_ptr()
    del large

    def search(free: list[tuple[int, int]], key: tuple[int, int]) -> int:
        place = bisect_left(free, key)
        held.clear()
        return place

    monkeypatch.setattr("polydelta.kernels.cpu.arena.bisect_left", search)
    assert arena.empty((90,), torch.float32).data_ptr() == address
