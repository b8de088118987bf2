"""An adapter in pages of the pool, and what it does to the layers that it is wrapped around."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.adapters_store.base_layout import (
    FINAL_NORM,
    MODEL,
    BaseLayout,
    FusedLinear,
    LinearPart,
    NormPart,
)
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    LowRank,
    NormWeight,
    Prefix,
    Rows,
    Scale,
    Side,
)
from polydelta.adapters_store.merged_weight import merge_into
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packing import pack
from polydelta.engine.deltas import AdapterSegment, StepDeltas, wrap_decoder
from polydelta.engine.models.layers import Norm
from polydelta.engine.pool_adapter import PoolAdapter
from polydelta.kernels.cpu.choice import cpu_kernels
from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.delta_groups import Linear
from polydelta.kernels.ops import Kernels
from polydelta.kernels.reference import ReferenceKernels

HIDDEN, LAYERS = 20, 3
QKV = FusedLinear(
    "qkv", HIDDEN, (LinearPart("q", 24), LinearPart("k", 8), LinearPart("v", 9)), True
)
LINEARS = (QKV, FusedLinear("o", 24, (LinearPart("o", HIDDEN),), True))
LAYOUT = BaseLayout(
    "blocks", LAYERS, LINEARS, (NormPart("norm", HIDDEN),), hidden_size=HIDDEN, vocab_size=11,
    num_kv_heads=1, head_dim=8,
)  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
KERNELS = pytest.mark.parametrize(
    "kernels",
    [ReferenceKernels(), CpuKernels(), cpu_kernels(torch.bfloat16)],
    ids=["ref", "cpu", "bfloat16"],
)
PLACES = pytest.mark.parametrize("scattered", [False, True], ids=["in one run", "scattered"])
# Of the largest number.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
PAGE_BYTES = 3 * 64


@dataclass
class Block:
    """A decoder layer of which only what an adapter can change is there."""

    linears: list[Linear]
    norms: list[Norm]

    def wrap_linears(self, wrap: Callable[[int, Linear], Linear]) -> None:
        self.linears = [wrap(index, linear) for index, linear in enumerate(self.linears)]

    def wrap_norms(self, wrap: Callable[[int, Norm], Norm]) -> None:
        self.norms = [wrap(index, norm) for index, norm in enumerate(self.norms)]


def rms_norm(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    if residual is not None:
        x += residual
    return F.rms_norm(x, x.shape[-1:], weight)


class Model:
    """Blocks with adapters around them, and the weights that they were made of."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        # By layer and name of the part: [out, in], and [out].
        self.weights = {
            (layer, part.name): (torch.randn(part.out_features, linear.in_features) / 5,
                                 torch.randn(part.out_features))
            for layer in range(LAYERS)
            for linear in LINEARS
            for part in linear.parts
        }  # fmt: skip
        self.blocks = [
            Block([self._linear(layer, linear, kernels, dtype) for linear in LINEARS], [rms_norm])
            for layer in range(LAYERS)
        ]
        self.step = StepDeltas(kernels)
        decoder: Any = SimpleNamespace(
            layers=self.blocks,
            embed=lambda x: x.clone(),
            norm=rms_norm,
            lm_head=lambda x: x.clone(),
        )
        wrap_decoder(decoder, self.step)
        self.final_norm: Norm = decoder.norm

    def merged(self, layer: int, index: int, adapter: Adapter | None, x: Tensor) -> Tensor:
        """What the layer gives with the adapter in its weights, float32."""
        parts = []
        for part in LINEARS[index].parts:
            deltas = (
                adapter.modules.get(LAYOUT.module_name(layer, part.name), ()) if adapter else ()
            )
            parts.append(F.linear(x, *merge_into(*self.weights[layer, part.name], deltas)))
        return torch.cat(parts, 1)

    def _linear(
        self, layer: int, linear: FusedLinear, kernels: Kernels, dtype: torch.dtype
    ) -> Linear:
        of_parts = [self.weights[layer, part.name] for part in linear.parts]
        stacked = (torch.cat(each).to(dtype) for each in zip(*of_parts, strict=True))
        return kernels.linear(*stacked)


def adapter_of(modules: Mapping[str, Sequence[Delta]], layers: Sequence[int] = (0, 2)) -> Adapter:
    """modules: by name of the part, the same in these layers."""
    placed = {
        LAYOUT.module_name(layer, part): tuple(deltas)
        for layer in layers
        for part, deltas in modules.items()
    }
    return Adapter("id", 1, "", "TEST", placed)


def in_pool(
    packed: PackedAdapter, kernels: Kernels | None = None, scattered: bool = False
) -> tuple[PoolAdapter, Tensor, list[int]]:
    """With the pool, which is full of junk, and its pages there."""
    count = -(-packed.bytes_per_layer // PAGE_BYTES)
    storage = torch.full((LAYERS, 2 * count + 3, PAGE_BYTES), 0xAB, dtype=torch.uint8)
    pages = list(range(2, count + 2))
    if scattered:
        pages = torch.randperm(2 * count + 3)[:count].sort(descending=True).values.tolist()
    return PoolAdapter(packed, storage, pages, kernels or CpuKernels()), storage, pages


def input_scale(size: int) -> Scale:
    return Scale(1 + torch.randn(size), Side.INPUT)


def low_rank(shape: tuple[int, int], rank: int = 3) -> LowRank:
    return LowRank(torch.randn(rank, shape[1]) / 5, torch.randn(shape[0], rank))


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype
    error = (got.float() - want).abs().max()
    assert error <= TOLERANCE[dtype] * want.abs().max()


SCALED: dict[str, Callable[[], dict[str, list[Delta]]]] = {
    "all of a linear": lambda: {"o": [input_scale(24)]},
    "k alone of a fused one": lambda: {"k": [input_scale(HIDDEN)]},
    "q and v, each by its own": lambda: {"q": [input_scale(HIDDEN)], "v": [input_scale(HIDDEN)]},
    "all parts of a fused one": lambda: {part: [input_scale(HIDDEN)] for part in "qkv"},
    # What is added sees the layer's own input.
    "beside what is added": lambda: {
        "o": [low_rank((HIDDEN, 24)), input_scale(24), Bias(torch.randn(HIDDEN))],
        "q": [low_rank((24, HIDDEN))],
        "k": [Bias(torch.randn(8)), low_rank((8, HIDDEN)), input_scale(HIDDEN)],
    },
    "beside a scale of the output": lambda: {
        "o": [Scale(torch.randn(HIDDEN), Side.OUTPUT), input_scale(24)],
        "k": [input_scale(HIDDEN), Scale(torch.randn(8), Side.OUTPUT)],
        "v": [Scale(torch.randn(9), Side.OUTPUT)],
    },
    "twice": lambda: {
        "o": [input_scale(24), input_scale(24)],
        "k": [input_scale(HIDDEN), input_scale(HIDDEN)],
    },
}


@PLACES
@DTYPES
@KERNELS
@pytest.mark.parametrize("name", SCALED)
def test_scaled_inputs_give_what_merged_weights_give(
    name: str, kernels: Kernels, dtype: torch.dtype, scattered: bool
) -> None:
    model = Model(kernels, dtype)
    adapter = adapter_of(SCALED[name]())
    bound, _, _ = in_pool(pack(adapter, LAYOUT, dtype), kernels, scattered)
    model.step.begin([AdapterSegment(0, 7, bound)])
    for layer in range(LAYERS):
        for index, linear in enumerate(LINEARS):
            x = torch.randn(7, linear.in_features)
            given = x.to(dtype, copy=True)
            got = model.blocks[layer].linears[index](given)
            near(got, model.merged(layer, index, adapter, x), dtype)
            assert torch.equal(given, x.to(dtype)), "others read the same input"


@PLACES
@DTYPES
@KERNELS
def test_each_row_is_computed_by_its_own_adapter(
    kernels: Kernels, dtype: torch.dtype, scattered: bool
) -> None:
    model = Model(kernels, dtype)
    adapters = [
        adapter_of(SCALED["beside what is added"]()),
        adapter_of({"q": [low_rank((24, HIDDEN), 5)], "o": [input_scale(24)]}, [0]),
    ]
    one, other = (in_pool(pack(a, LAYOUT, dtype), kernels, scattered)[0] for a in adapters)
    rows = [(slice(0, 2), None), (slice(2, 5), adapters[0]), (slice(5, 9), adapters[1])]
    bare = slice(9, 11)
    for layer in range(LAYERS):
        for index, linear in enumerate(LINEARS):
            x = torch.randn(11, linear.in_features)
            model.step.begin([])
            base = model.blocks[layer].linears[index](x.to(dtype))
            model.step.begin([AdapterSegment(2, 5, one), AdapterSegment(5, 9, other)])
            got = model.blocks[layer].linears[index](x.to(dtype))
            for part, adapter in rows:
                near(got[part], model.merged(layer, index, adapter, x[part]), dtype)
            assert torch.equal(got[bare], base[bare])


@PLACES
@DTYPES
@KERNELS
def test_in_a_sum_biases_and_matrices_have_the_weight_of_their_adapter(
    kernels: Kernels, dtype: torch.dtype, scattered: bool
) -> None:
    model = Model(kernels, dtype)
    changed_rows = Rows(24, torch.tensor([0, 7, 23]).int(), torch.randn(3, HIDDEN) / 5)
    weighted = [
        (
            adapter_of({"q": [Bias(torch.randn(24)), changed_rows], "o": [Bias(torch.randn(20))]}),
            0.5,
        ),
        (adapter_of({"q": [Bias(torch.randn(24)), low_rank((24, HIDDEN))]}), -2.0),
        (adapter_of({"v": [Bias(torch.randn(9))], "o": [low_rank((20, 24))]}), 1.0),
    ]
    model.step.begin(
        [
            AdapterSegment(1, 6, in_pool(pack(a, LAYOUT, dtype), kernels, scattered)[0], weight)
            for a, weight in weighted
        ]
    )
    for layer in range(LAYERS):
        for index, linear in enumerate(LINEARS):
            x = torch.randn(6, linear.in_features)
            base = model.merged(layer, index, None, x)
            want = base.clone()
            for adapter, weight in weighted:
                want[1:] += weight * (model.merged(layer, index, adapter, x) - base)[1:]
            near(model.blocks[layer].linears[index](x.to(dtype)), want, dtype)


@PLACES
@DTYPES
def test_replaced_norms(dtype: torch.dtype, scattered: bool) -> None:
    model = Model(CpuKernels(), dtype)
    weight, last = torch.randn(2, HIDDEN)
    norms = {LAYOUT.module_name(1, "norm"): (NormWeight(weight),), FINAL_NORM: (NormWeight(last),)}
    packed = pack(Adapter("id", 1, "", "TEST", norms), LAYOUT, dtype)
    bound, _, _ = in_pool(packed, scattered=scattered)
    model.step.begin([AdapterSegment(1, 4, bound)], [AdapterSegment(2, 3, bound)])
    x = torch.randn(5, HIDDEN).to(dtype)
    own = torch.ones(HIDDEN)
    for layer, block in enumerate(model.blocks):
        got = block.norms[0](x)
        near(got[1:4], rms_norm(x[1:4].float(), weight if layer == 1 else own), dtype)
        assert torch.equal(got[[0, 4]], rms_norm(x)[[0, 4]])
        residual, total = torch.randn(5, HIDDEN).to(dtype), x.clone()
        got = block.norms[0](total, residual=residual)
        assert torch.equal(total, x + residual)
        near(got[1:4], rms_norm(total[1:4].float(), weight if layer == 1 else own), dtype)
        assert torch.equal(got[[0, 4]], rms_norm(total)[[0, 4]])
    got = model.final_norm(x)
    near(got[2:3], rms_norm(x[2:3].float(), last), dtype)
    assert torch.equal(got[[0, 1, 3, 4]], rms_norm(x)[[0, 1, 3, 4]])


@PLACES
def test_it_writes_its_own_pages_alone_and_needs_the_hosts_bytes_no_more(scattered: bool) -> None:
    model, adapter = (
        Model(CpuKernels(), torch.float32),
        adapter_of(SCALED["beside what is added"]()),
    )
    packed = pack(adapter, LAYOUT, torch.float32)
    bound, storage, pages = in_pool(packed, scattered=scattered)
    assert len(pages) > 3
    others = [page for page in range(storage.shape[1]) if page not in pages]
    assert (storage[:, others] == 0xAB).all()
    for layer, content in enumerate(packed.layers):
        assert torch.equal(storage[layer, pages].view(-1)[: len(content.data)], content.data)
        assert (storage[layer, pages].view(-1)[len(content.data) :] == 0xAB).all()
        content.data.zero_()
    storage[:, others] = 0xFF
    model.step.begin([AdapterSegment(0, 7, bound)])
    x = torch.randn(7, HIDDEN)
    # Layers in any order: of scattered pages only one layer is at hand.
    for layer in (2, 0, 1, 0):
        got = model.blocks[layer].linears[0](x)
        near(got, model.merged(layer, 0, adapter, x), torch.float32)


def test_an_adapter_without_weights_has_no_pages_and_changes_nothing() -> None:
    prefix = Prefix(torch.randn(LAYERS, 2, 5, 1, 8))
    packed = pack(Adapter("id", 1, "", "TEST", {MODEL: (prefix,)}), LAYOUT, torch.float32)
    bound, storage, pages = in_pool(packed)
    assert not pages
    assert (storage == 0xAB).all()
    for layer in range(LAYERS):
        assert all(bound.linear(layer, index) is None for index in range(len(LINEARS)))
        assert bound.norm(layer, 0) is None
    assert (bound.final_norm, bound.embedding, bound.head) == (None, None, None)


def test_what_it_does_not_change_it_has_nothing_for() -> None:
    packed = pack(adapter_of({"k": [low_rank((8, HIDDEN))]}, [1]), LAYOUT, torch.float32)
    for scattered in (False, True):
        bound, _, _ = in_pool(packed, scattered=scattered)
        changed = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
        assert [place for place in changed if bound.linear(*place) is not None] == [(1, 0)]
