"""Deltas in packed weights: the same sum as unmerged, and every bit back afterwards."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.kernels.cpu import native
from polydelta.kernels.cpu.fusing import FusedEntries
from polydelta.kernels.cpu.linear import PackedLinear
from polydelta.kernels.cpu.packed_layout import layout_of, memory_of, pack
from polydelta.kernels.delta_weights import LowRankBlock, LowRankWeights, SparseWeights
from polydelta.kernels.fusing import Fused, FusedWeight, entry_rows, with_deltas

Near = Callable[[Tensor, Tensor, torch.dtype], None]
Delta = LowRankWeights | SparseWeights

LIBRARY = native.load()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# One entry, less than a block, blocks with padding on either side and on none; [out, in].
SHAPES = [(1, 1), (7, 5), (49, 33), (17, 130), (100, 60), (184, 60), (64, 32), (960, 576)]
SIZES = pytest.mark.parametrize("shape", SHAPES, ids=str)
COMPILER = pytest.mark.parametrize(
    "library",
    [
        pytest.param(LIBRARY, marks=pytest.mark.skipif(not shutil.which("cc"), reason="no cc")),
        None,
    ],
    ids=["native", "torch"],
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sparse(shape: tuple[int, int], dtype: torch.dtype, share: float = 0.1) -> SparseWeights:
    wanted = torch.rand(shape) < share
    wanted[torch.randint(shape[0], ()), torch.randint(shape[1], ())] = True
    pointers = F.pad(wanted.sum(1).cumsum(0), (1, 0)).int()
    columns = wanted.nonzero()[:, 1].int()
    return SparseWeights(pointers, columns, torch.randn(len(columns)).to(dtype))


def low_rank(
    shape: tuple[int, int], dtype: torch.dtype, ranks: Sequence[int] = (3,)
) -> LowRankWeights:
    """The rows cut into as many parts as there are ranks, as of q, k and v."""
    out_features, in_features = shape
    blocks, start, rank_start = [], 0, 0
    for number, rank in enumerate(ranks):
        stop = out_features * (number + 1) // len(ranks)
        blocks.append(LowRankBlock(start, rank_start, torch.randn(rank, stop - start).to(dtype)))
        start, rank_start = stop, rank_start + rank
    # Rows with something between them, as in an adapter's pages.
    a = torch.randn(sum(ranks), in_features + 3).to(dtype)[:, :in_features]
    return LowRankWeights(a, tuple(blocks))


def dense(shape: tuple[int, int], deltas: Sequence[Delta]) -> Tensor:
    """dW in float64."""
    return with_deltas(torch.zeros(shape, dtype=torch.float64), deltas)


def linear_of(
    weight: Tensor, library: native.NativeLibrary | None = LIBRARY, bias: Tensor | None = None
) -> PackedLinear:
    return PackedLinear(weight, bias, library)


def raw(linear: PackedLinear) -> Tensor:
    """A copy of the bytes that lie in memory, padding included."""
    return memory_of(linear.weight).view(torch.uint8).clone()


def check_fused(linear: PackedLinear, weight: Tensor, deltas: Sequence[Delta]) -> None:
    """What is in the weight is the exact sum, rounded once."""
    change = dense((weight.shape[0], weight.shape[1]), deltas)
    expected = weight.double() + change
    # Half a unit in the last place of the sum, and what float32 loses on the way to it.
    rounding = torch.finfo(weight.dtype).eps / 2 * expected.abs()
    bound = rounding * 1.01 + 1e-6 * (weight.double().abs() + change.abs().max())
    error = (linear.weight.to_dense().double() - expected).abs()
    assert bool((error <= bound).all()), f"off by up to {float((error - bound).max()):.3g}"


def check_switch(
    near: Near, weight: Tensor, deltas: Sequence[Delta], library: native.NativeLibrary | None
) -> Fused:
    """In, compared, out, compared."""
    dtype = weight.dtype
    bias = torch.randn(weight.shape[0]).to(dtype)
    linear = linear_of(weight, library, bias)
    before = raw(linear)
    fused = linear.prepare(deltas)
    assert torch.equal(raw(linear), before)
    fused.fuse()
    check_fused(linear, weight, deltas)
    x = torch.randn(9, weight.shape[1]).to(dtype)
    merged = weight.double() + dense((weight.shape[0], weight.shape[1]), deltas)
    with torch.inference_mode():
        near(linear(x), F.linear(x.double(), merged, bias.double()), dtype)
    fused.unfuse()
    assert torch.equal(raw(linear), before)
    assert torch.equal(linear.weight.to_dense(), weight)
    return fused


@DTYPES
@SIZES
def test_the_layout_says_where_each_entry_lies(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layout = layout_of(torch.Size(shape), dtype)
    assert layout is not None
    weight = torch.randn(shape).to(dtype)
    packed = pack(weight)
    rows, columns = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    places = layout.places(rows, columns)
    memory = memory_of(packed)
    assert torch.equal(memory[places], weight)
    assert len(places.unique()) == weight.numel()
    memory[places] = 0.0
    assert not memory.any(), "the padding is not zero"


@DTYPES
@SIZES
@COMPILER
def test_sparse_deltas_go_in_and_out(
    near: Near,
    shape: tuple[int, int],
    dtype: torch.dtype,
    library: native.NativeLibrary | None,
) -> None:
    fused = check_switch(near, torch.randn(shape).to(dtype), [sparse(shape, dtype)], library)
    assert isinstance(fused, FusedEntries)


@DTYPES
@SIZES
@pytest.mark.parametrize("ranks", [(1,), (12,), (2, 5, 3)], ids=str)
def test_low_rank_deltas_go_in_and_out(
    near: Near, shape: tuple[int, int], dtype: torch.dtype, ranks: Sequence[int]
) -> None:
    fused = check_switch(
        near, torch.randn(shape).to(dtype), [low_rank(shape, dtype, ranks)], LIBRARY
    )
    assert isinstance(fused, FusedWeight)


@DTYPES
@SIZES
def test_both_kinds_in_one_layer_are_rounded_once(
    near: Near, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    deltas = [low_rank(shape, dtype), sparse(shape, dtype), sparse(shape, dtype)]
    check_switch(near, torch.randn(shape).to(dtype), deltas, LIBRARY)


@DTYPES
@pytest.mark.parametrize("make", [sparse, low_rank])
def test_a_layout_that_nobody_knows_is_no_hindrance(
    near: Near,
    dtype: torch.dtype,
    make: Callable[..., Delta],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("polydelta.kernels.cpu.packed_layout.layout_of", lambda shape, dtype: None)
    fused = check_switch(near, torch.randn(49, 33).to(dtype), [make((49, 33), dtype)], LIBRARY)
    assert isinstance(fused, FusedWeight)


@DTYPES
@SIZES
def test_many_switches_in_any_order_leave_no_trace(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    linear = linear_of(weight)
    before = raw(linear)
    sets: list[list[Delta]] = [
        [sparse(shape, dtype, 0.5)],
        [sparse(shape, dtype, 0.02)],
        [low_rank(shape, dtype, (4, 1))],
        [low_rank(shape, dtype), sparse(shape, dtype)],
    ]
    fused = [(linear.prepare(deltas), deltas) for deltas in sets]
    for number, (delta, deltas) in enumerate(random.Random(3).choices(fused, k=40)):
        delta.fuse()
        if number < 12:
            check_fused(linear, weight, deltas)
        delta.unfuse()
        assert torch.equal(raw(linear), before)


@DTYPES
@pytest.mark.parametrize("inside", [sparse, low_rank])
@pytest.mark.parametrize("make", [sparse, low_rank])
def test_what_is_in_the_weight_does_not_get_into_what_is_prepared(
    dtype: torch.dtype, inside: Callable[..., Delta], make: Callable[..., Delta]
) -> None:
    shape = (49, 33)
    weight = torch.randn(shape).to(dtype)
    linear, other = linear_of(weight), inside(shape, dtype)
    first = linear.prepare([other])
    first.fuse()
    delta = make(shape, dtype)
    second = linear.prepare([delta])
    check_fused(linear, weight, [other])
    first.unfuse()
    second.fuse()
    check_fused(linear, weight, [delta])
    second.unfuse()
    assert torch.equal(linear.weight.to_dense(), weight)


@DTYPES
def test_preparing_on_another_thread_while_deltas_go_in_and_out(dtype: torch.dtype) -> None:
    shape = (184, 60)
    weight = torch.randn(shape).to(dtype)
    linear, deltas = linear_of(weight), [sparse(shape, dtype, 0.3)]
    busy, prepared = linear.prepare(deltas), []
    other = [sparse(shape, dtype, 0.3)]
    thread = threading.Thread(
        target=lambda: prepared.extend(linear.prepare(other) for _ in range(30))
    )
    thread.start()
    while thread.is_alive():
        busy.fuse()
        busy.unfuse()
    assert len(prepared) == 30
    for fused in prepared:
        fused.fuse()
        check_fused(linear, weight, other)
        fused.unfuse()
        assert torch.equal(linear.weight.to_dense(), weight)


def test_bits_that_arithmetic_would_lose_come_back() -> None:
    """Negative zeros, subnormal numbers, infinities and NaNs with a payload."""
    bits = torch.tensor([-32768, 1, -32767, 0x7F80, 0x7FC1, -63, 0x3F80, 0], dtype=torch.int16)
    weight = bits.repeat(5).view(torch.bfloat16).view(8, 5)
    linear = linear_of(weight)
    before = raw(linear)
    everything = SparseWeights(
        torch.arange(9).int() * 5, torch.arange(5).int().repeat(8), torch.randn(40).bfloat16()
    )
    fused = linear.prepare([everything])
    fused.fuse()
    assert not torch.equal(raw(linear), before)
    fused.unfuse()
    assert torch.equal(raw(linear), before)


@DTYPES
def test_a_delta_without_entries_changes_nothing(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5).to(dtype)
    linear = linear_of(weight)
    none = SparseWeights(torch.zeros(8).int(), torch.zeros(0).int(), torch.zeros(0).to(dtype))
    fused = linear.prepare([none])
    fused.fuse()
    assert torch.equal(linear.weight.to_dense(), weight)
    fused.unfuse()


def test_what_was_prepared_in_inference_mode_works_outside_of_it_and_the_other_way_round() -> None:
    shape = (49, 33)
    weight, delta = torch.randn(shape), sparse(shape, torch.float32)
    for within, without in ((True, False), (False, True)):
        linear = linear_of(weight, None)
        with torch.inference_mode(within):
            fused = linear.prepare([delta])
        with torch.inference_mode(without):
            fused.fuse()
        check_fused(linear, weight, [delta])
        with torch.inference_mode(within):
            fused.unfuse()
        assert torch.equal(linear.weight.to_dense(), weight)


@DTYPES
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_the_compiled_scatter_writes_what_torch_writes(dtype: torch.dtype, count: int) -> None:
    assert LIBRARY is not None
    memory = torch.randn(3001).to(dtype)
    expected = memory.clone()
    places, values = torch.randperm(3001)[:count], torch.randn(count).to(dtype)
    expected[places] = values
    LIBRARY.scatter(memory, places.int(), values)
    assert torch.equal(memory, expected)


def test_rows_of_entries_survive_empty_rows_at_both_ends() -> None:
    pointers = torch.tensor([0, 0, 2, 2, 3, 3]).int()
    delta = SparseWeights(pointers, torch.tensor([0, 4, 1]).int(), torch.ones(3))
    assert entry_rows(delta).tolist() == [1, 1, 3]
