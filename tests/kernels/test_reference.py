"""The reference itself, against definitions written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from polydelta.engine.models.config import RopeConfig
from polydelta.engine.models.rope import rope_tables
from polydelta.kernels.delta_weights import LowRankBlock, LowRankWeights, SparseWeights
from polydelta.kernels.ops import AttentionShape, SequenceSlice, kernels_for
from polydelta.kernels.reference import ReferenceKernels, visible

Near = Callable[[Tensor, Tensor, torch.dtype], None]
REFERENCE = ReferenceKernels()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attend_one_by_one(step: Any) -> Tensor:
    """Each query and head for itself, over a plain list of what it sees."""
    shape, out = step.shape, torch.zeros_like(step.queries, dtype=torch.float64)
    group = shape.num_heads // shape.num_kv_heads
    for sequence in step.sequences:
        for row in range(sequence.length):
            position = sequence.context - sequence.length + row
            first = 0 if shape.window is None else max(0, position - shape.window + 1)
            places = [
                (sequence.pages[p // shape.block_size], p % shape.block_size)
                for p in range(first, position + 1)
            ]
            for head in range(shape.num_heads):
                query = step.queries[sequence.start + row, head].double()
                kv_head = head // group
                keys = torch.stack([step.kv[page, 0, at, kv_head].double() for page, at in places])
                values = torch.stack(
                    [step.kv[page, 1, at, kv_head].double() for page, at in places]
                )
                weights = (keys @ query / math.sqrt(shape.head_dim)).softmax(0)
                out[sequence.start + row, head] = weights @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_attention_is_what_each_query_alone_would_get(
    paged_step: Callable[..., Any], near: Near, heads: int, kv_heads: int, window: int | None
) -> None:
    shape = AttentionShape(heads, kv_heads, head_dim=6, block_size=4, window=window)
    lengths = [(1, 1), (5, 5), (1, 11), (3, 9), (7, 8)]
    step = paged_step(shape, lengths, torch.float32)
    plan = REFERENCE.plan_attention(shape, step.sequences, torch.float32)
    near(REFERENCE.attention(plan, step.queries, step.kv), attend_one_by_one(step), torch.float32)


def test_a_query_sees_itself_and_what_came_before_within_the_window() -> None:
    sequence = SequenceSlice(start=0, length=2, context=5, pages=[0])
    here = torch.device("cpu")
    assert visible(sequence, None, here).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visible(sequence, 2, here).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_attention_reads_nothing_beyond_its_context(
    paged_step: Callable[..., Any], near: Near
) -> None:
    shape = AttentionShape(4, 2, head_dim=8, block_size=4)
    step = paged_step(shape, [(1, 6), (3, 9)], torch.float32, junk=math.nan)
    plan = REFERENCE.plan_attention(shape, step.sequences, torch.float32)
    near(REFERENCE.attention(plan, step.queries, step.kv), attend_one_by_one(step), torch.float32)


def test_keys_and_values_land_where_attention_looks_for_them() -> None:
    kv = torch.zeros(5, 2, 4, 3, 6)
    keys, values = torch.randn(2, 7, 3, 6)
    slots = torch.tensor([0, 3, 19, 8, 9, 4, 14])
    REFERENCE.store_kv(kv, keys, values, slots)
    for row, slot in enumerate(slots.tolist()):
        assert torch.equal(kv[slot // 4, 0, slot % 4], keys[row])
        assert torch.equal(kv[slot // 4, 1, slot % 4], values[row])
    assert int((kv.abs().sum((3, 4)) > 0).sum()) == 2 * 7


def test_low_rank_equals_the_merged_weight(near: Near) -> None:
    """Two blocks side by side, of ranks 3 and 12, with a gap of outputs that none adds to."""
    x, y = torch.randn(5, 16), torch.randn(5, 20)
    a, b_t = torch.randn(15, 16), [torch.randn(3, 8), torch.randn(12, 6)]
    weights = LowRankWeights(a, (LowRankBlock(0, 0, b_t[0]), LowRankBlock(11, 3, b_t[1])))
    delta = torch.zeros(20, 16, dtype=torch.float64)
    delta[0:8] = b_t[0].double().T @ a[:3].double()
    delta[11:17] = b_t[1].double().T @ a[3:].double()
    expected = y.double() + x.double() @ delta.T
    REFERENCE.add_delta(weights)(y, x)
    near(y, expected, torch.float32)


def test_sparse_equals_the_dense_weight(near: Near) -> None:
    x, y = torch.randn(4, 10), torch.randn(4, 6)
    delta = torch.randn(6, 10) * (torch.rand(6, 10) < 0.3)
    delta[2] = 0.0
    csr = delta.to_sparse_csr()
    weights = SparseWeights(csr.crow_indices().int(), csr.col_indices().int(), csr.values())
    expected = y.double() + x.double() @ delta.double().T
    REFERENCE.add_delta(weights)(y, x)
    near(y, expected, torch.float32)


def test_rotation_is_that_of_transformers(near: Near) -> None:
    x, positions = torch.randn(9, 3, 8), torch.tensor([0, 1, 2, 7, 3, 40, 41, 5, 0])
    cos, sin = rope_tables(RopeConfig(theta=10000.0), 8, 64, torch.float32)
    halves = (torch.arange(64)[:, None] / 10000.0 ** (torch.arange(0, 8, 2) / 8)).repeat(1, 2)
    plain_cos, plain_sin = halves.cos()[positions], halves.sin()[positions]
    theirs, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], plain_cos[None], plain_sin[None]
    )
    got = REFERENCE.rotate(x, cos[positions], sin[positions])
    near(got, theirs[0].transpose(0, 1), torch.float32)


def test_rms_norm_follows_its_formula(near: Near) -> None:
    x, weight = torch.randn(5, 33), torch.randn(33)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    near(REFERENCE.rms_norm(x, weight, 1e-5), expected, torch.float32)


def test_the_gate_is_the_first_half(near: Near) -> None:
    x = torch.randn(5, 14)
    gate, up = x.double().chunk(2, -1)
    near(REFERENCE.silu_mul(x), gate / (1 + (-gate).exp()) * up, torch.float32)


def test_each_device_has_its_kernels() -> None:
    assert type(kernels_for(torch.device("cpu"), torch.float32)).__name__ == "CpuKernels"
    # No GPU is touched before there is something to do.
    on_gpu = kernels_for(torch.device("cuda", 0), torch.float32)
    assert type(on_gpu).__name__ == "TritonKernels"
    assert on_gpu.device == torch.device("cuda", 0)
