"""Deltas in packed weights: the same sum as unmerged, and every bit back afterwards."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.kernels.cpu import native
from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.fusing import FusedEntries
from polydelta.kernels.cpu.linear import PackedLinear
from polydelta.kernels.cpu.packed_layout import layout_of, memory_of, pack
from polydelta.kernels.cpu.panels import PanelLinear
from polydelta.kernels.delta_weights import LowRankBlock, LowRankWeights, SparseWeights
from polydelta.kernels.fusing import Fused, FusedWeight, entry_rows, with_deltas

Near = Callable[[Tensor, Tensor, torch.dtype], None]
Delta = LowRankWeights | SparseWeights
Layer = PackedLinear | PanelLinear
# A dtype as oneDNN packs it, or "panels".
Kind = torch.dtype | str

LIBRARY = native.load()
OURS = Bfloat16Kernels(LIBRARY, 2) if LIBRARY is not None and LIBRARY.computes_decoders else None
# Panels of our own, in the place of oneDNN's packing.
PANELS = pytest.param(
    "panels", marks=pytest.mark.skipif(OURS is None, reason="no compiler or no AVX512-BF16")
)
KINDS = pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, PANELS], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# One entry, less than a block, blocks with padding on either side and on none; [out, in].
SHAPES = [(1, 1), (7, 5), (49, 33), (17, 130), (100, 60), (184, 60), (64, 32), (960, 576)]
SIZES = pytest.mark.parametrize("shape", SHAPES, ids=str)
COMPILER = pytest.mark.parametrize(
    "library",
    [
        pytest.param(LIBRARY, marks=pytest.mark.skipif(LIBRARY is None, reason="no cc")),
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


def dtype_of(kind: Kind) -> torch.dtype:
    return kind if isinstance(kind, torch.dtype) else torch.bfloat16


def shape_of(kind: Kind, shape: tuple[int, int]) -> tuple[int, int]:
    """Panels have an even number of columns."""
    out_features, in_features = shape
    return (out_features, in_features + in_features % 2) if kind == "panels" else shape


def linear_of(
    kind: Kind,
    weight: Tensor,
    library: native.NativeLibrary | None = LIBRARY,
    bias: Tensor | None = None,
) -> Layer:
    if kind != "panels":
        return PackedLinear(weight, bias, library)
    assert OURS is not None
    linear = OURS.linear(weight, bias)
    assert isinstance(linear, PanelLinear)
    return linear


def raw(linear: Layer) -> Tensor:
    """A copy of the bytes that lie in memory, padding included."""
    panels = isinstance(linear, PanelLinear)
    memory = linear.packing.memory(linear.weight) if panels else memory_of(linear.weight)
    return memory.view(torch.uint8).clone()


def plain(linear: Layer) -> Tensor:
    """The weight, `[out, in]`."""
    panels = isinstance(linear, PanelLinear)
    return linear.packing.unpack(linear.weight) if panels else linear.weight.to_dense()


def check_fused(linear: Layer, weight: Tensor, deltas: Sequence[Delta]) -> None:
    """What is in the weight is the exact sum, rounded once."""
    change = dense((weight.shape[0], weight.shape[1]), deltas)
    expected = weight.double() + change
    # Half a unit in the last place of the sum, and what float32 loses on the way to it.
    rounding = torch.finfo(weight.dtype).eps / 2 * expected.abs()
    bound = rounding * 1.01 + 1e-6 * (weight.double().abs() + change.abs().max())
    error = (plain(linear).double() - expected).abs()
    assert bool((error <= bound).all()), f"off by up to {float((error - bound).max()):.3g}"


def check_switch(
    near: Near,
    kind: Kind,
    weight: Tensor,
    deltas: Sequence[Delta],
    library: native.NativeLibrary | None,
) -> Fused:
    """In, compared, out, compared."""
    dtype = weight.dtype
    bias = torch.randn(weight.shape[0]).to(dtype)
    linear = linear_of(kind, weight, library, bias)
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
    assert torch.equal(plain(linear), weight)
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


@KINDS
@SIZES
@COMPILER
def test_sparse_deltas_go_in_and_out(
    near: Near,
    shape: tuple[int, int],
    kind: Kind,
    library: native.NativeLibrary | None,
) -> None:
    shape, dtype = shape_of(kind, shape), dtype_of(kind)
    weight = torch.randn(shape).to(dtype)
    fused = check_switch(near, kind, weight, [sparse(shape, dtype)], library)
    assert isinstance(fused, FusedEntries)


@KINDS
@SIZES
@pytest.mark.parametrize("ranks", [(1,), (12,), (2, 5, 3)], ids=str)
def test_low_rank_deltas_go_in_and_out(
    near: Near, shape: tuple[int, int], kind: Kind, ranks: Sequence[int]
) -> None:
    shape, dtype = shape_of(kind, shape), dtype_of(kind)
    weight = torch.randn(shape).to(dtype)
    fused = check_switch(near, kind, weight, [low_rank(shape, dtype, ranks)], LIBRARY)
    assert isinstance(fused, FusedWeight)


@KINDS
@SIZES
def test_both_kinds_in_one_layer_are_rounded_once(
    near: Near, shape: tuple[int, int], kind: Kind
) -> None:
    shape, dtype = shape_of(kind, shape), dtype_of(kind)
    deltas = [low_rank(shape, dtype), sparse(shape, dtype), sparse(shape, dtype)]
    check_switch(near, kind, torch.randn(shape).to(dtype), deltas, LIBRARY)


@DTYPES
@pytest.mark.parametrize("make", [sparse, low_rank])
def test_a_layout_that_nobody_knows_is_no_hindrance(
    near: Near,
    dtype: torch.dtype,
    make: Callable[..., Delta],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("polydelta.kernels.cpu.packed_layout.layout_of", lambda shape, dtype: None)
    weight, delta = torch.randn(49, 33).to(dtype), make((49, 33), dtype)
    fused = check_switch(near, dtype, weight, [delta], LIBRARY)
    assert isinstance(fused, FusedWeight)


@KINDS
@SIZES
def test_many_switches_in_any_order_leave_no_trace(shape: tuple[int, int], kind: Kind) -> None:
    shape, dtype = shape_of(kind, shape), dtype_of(kind)
    weight = torch.randn(shape).to(dtype)
    linear = linear_of(kind, weight)
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


@KINDS
@pytest.mark.parametrize("inside", [sparse, low_rank])
@pytest.mark.parametrize("make", [sparse, low_rank])
def test_what_is_in_the_weight_does_not_get_into_what_is_prepared(
    kind: Kind, inside: Callable[..., Delta], make: Callable[..., Delta]
) -> None:
    shape, dtype = shape_of(kind, (49, 33)), dtype_of(kind)
    weight = torch.randn(shape).to(dtype)
    linear, other = linear_of(kind, weight), inside(shape, dtype)
    first = linear.prepare([other])
    first.fuse()
    delta = make(shape, dtype)
    second = linear.prepare([delta])
    check_fused(linear, weight, [other])
    first.unfuse()
    second.fuse()
    check_fused(linear, weight, [delta])
    second.unfuse()
    assert torch.equal(plain(linear), weight)


@KINDS
def test_preparing_on_another_thread_while_deltas_go_in_and_out(kind: Kind) -> None:
    shape, dtype = (184, 60), dtype_of(kind)
    weight = torch.randn(shape).to(dtype)
    linear, deltas = linear_of(kind, weight), [sparse(shape, dtype, 0.3)]
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
        assert torch.equal(plain(linear), weight)


@pytest.mark.parametrize("kind", [torch.bfloat16, PANELS], ids=str)
def test_bits_that_arithmetic_would_lose_come_back(kind: Kind) -> None:
    """Negative zeros, subnormal numbers, infinities and NaNs with a payload."""
    bits = torch.tensor([-32768, 1, -32767, 0x7F80, 0x7FC1, -63, 0x3F80, 0], dtype=torch.int16)
    weight = bits.repeat(6).view(torch.bfloat16).view(8, 6)
    linear = linear_of(kind, weight)
    before = raw(linear)
    everything = SparseWeights(
        torch.arange(9).int() * 6, torch.arange(6).int().repeat(8), torch.randn(48).bfloat16()
    )
    fused = linear.prepare([everything])
    fused.fuse()
    assert not torch.equal(raw(linear), before)
    fused.unfuse()
    assert torch.equal(raw(linear), before)


@KINDS
def test_a_delta_without_entries_changes_nothing(kind: Kind) -> None:
    dtype = dtype_of(kind)
    weight = torch.randn(7, 6).to(dtype)
    linear = linear_of(kind, weight)
    none = SparseWeights(torch.zeros(8).int(), torch.zeros(0).int(), torch.zeros(0).to(dtype))
    fused = linear.prepare([none])
    fused.fuse()
    assert torch.equal(plain(linear), weight)
    fused.unfuse()


@KINDS
def test_what_was_prepared_in_inference_mode_works_outside_of_it_and_the_other_way_round(
    kind: Kind,
) -> None:
    shape, dtype = shape_of(kind, (49, 33)), dtype_of(kind)
    weight, delta = torch.randn(shape).to(dtype), sparse(shape, dtype)
    for within, without in ((True, False), (False, True)):
        linear = linear_of(kind, weight, None)
        with torch.inference_mode(within):
            fused = linear.prepare([delta])
        with torch.inference_mode(without):
            fused.fuse()
        check_fused(linear, weight, [delta])
        with torch.inference_mode(within):
            fused.unfuse()
        assert torch.equal(plain(linear), weight)


@DTYPES
@pytest.mark.skipif(LIBRARY is None, reason="there is no C compiler")
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
