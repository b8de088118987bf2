"""The CPU's other operations against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.engine.models.config import RopeConfig
from polydelta.engine.models.rope import rope_tables
from polydelta.kernels.cpu.choice import cpu_kernels
from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.reference import ReferenceKernels

Near = Callable[[Tensor, Tensor, torch.dtype], None]

REFERENCE = ReferenceKernels()
# The last are our own where the machine has what they need.
KERNELS = pytest.mark.parametrize(
    ("cpu", "dtype"),
    [
        (CpuKernels(), torch.float32),
        (CpuKernels(), torch.bfloat16),
        (cpu_kernels(torch.bfloat16), torch.bfloat16),
    ],
    ids=["float32", "bfloat16", "chosen"],
)
TOKENS = pytest.mark.parametrize("tokens", [1, 7, 16, 65])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@KERNELS
@TOKENS
@pytest.mark.parametrize(("inputs", "outputs"), [(60, 92), (1, 5), (33, 1), (576, 192)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_agrees_with_torch(
    near: Near,
    cpu: CpuKernels,
    dtype: torch.dtype,
    tokens: int,
    inputs: int,
    outputs: int,
    biased: bool,
) -> None:
    x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) * 10 if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.inference_mode():
        near(cpu.linear(weight, bias)(x), expected, dtype)


@KERNELS
def test_linear_takes_weights_and_rows_that_are_views(
    near: Near, cpu: CpuKernels, dtype: torch.dtype
) -> None:
    weight = torch.randn(40, 24).to(dtype).t()[:, 3:33]  # [24, 30], neither axis dense
    x = torch.randn(9, 50).to(dtype)[2:7, 10:40]
    expected = F.linear(x.double(), weight.double())
    with torch.inference_mode():
        near(cpu.linear(weight, None)(x), expected, dtype)


@KERNELS
@TOKENS
def test_each_row_of_a_linear_layer_is_the_same_alone(
    near: Near, cpu: CpuKernels, dtype: torch.dtype, tokens: int
) -> None:
    x, weight = torch.randn(tokens, 64).to(dtype), torch.randn(48, 64).to(dtype)
    linear = cpu.linear(weight, None)
    with torch.inference_mode():
        alone = torch.cat([linear(row[None]) for row in x])
        near(linear(x), alone, dtype)


@KERNELS
@pytest.mark.parametrize("shape", [(1, 8), (7, 60), (5, 3, 10), (65, 576)])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_agrees_with_the_reference(
    near: Near, cpu: CpuKernels, dtype: torch.dtype, shape: tuple[int, ...], eps: float
) -> None:
    x, weight = torch.randn(shape).to(dtype) * 0.1, torch.randn(shape[-1]).to(dtype)
    expected = REFERENCE.rms_norm(x.float(), weight.float(), eps)
    near(cpu.rms_norm(x, weight, eps), expected, dtype)


@KERNELS
@TOKENS
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 10), (9, 64)])
def test_rotation_agrees_with_the_reference(
    near: Near, cpu: CpuKernels, dtype: torch.dtype, tokens: int, heads: int, head_dim: int
) -> None:
    x = torch.randn(tokens, heads, head_dim).to(dtype)
    cos, sin = rope_tables(RopeConfig(theta=10000.0), head_dim, 99, dtype)
    positions = torch.randint(0, 99, (tokens,))
    cos, sin = cos[positions], sin[positions]
    expected = REFERENCE.rotate(x.float(), cos.float(), sin.float())
    near(cpu.rotate(x, cos, sin), expected, dtype)


@KERNELS
def test_rotation_takes_a_slice_of_a_fused_projection(
    near: Near, cpu: CpuKernels, dtype: torch.dtype
) -> None:
    fused = torch.randn(5, 7 * 8).to(dtype)
    x = fused[:, 16:40].view(5, 3, 8)
    cos, sin = rope_tables(RopeConfig(theta=500.0), 8, 5, dtype)
    before = fused.clone()
    expected = REFERENCE.rotate(x.float(), cos.float(), sin.float())
    near(cpu.rotate(x, cos, sin), expected, dtype)
    for others in (slice(16), slice(40, None)):
        assert torch.equal(fused[:, others], before[:, others])


@KERNELS
@TOKENS
@pytest.mark.parametrize("width", [1, 46, 1536])
def test_silu_mul_agrees_with_the_reference(
    near: Near, cpu: CpuKernels, dtype: torch.dtype, tokens: int, width: int
) -> None:
    x = torch.randn(tokens, 2 * width).to(dtype) * 3
    before = x.clone()
    near(cpu.silu_mul(x), REFERENCE.silu_mul(x.float()), dtype)
    assert torch.equal(x, before)


@KERNELS
@pytest.mark.parametrize(("block_size", "heads", "head_dim"), [(1, 1, 4), (3, 2, 10), (16, 3, 64)])
def test_store_kv_writes_what_the_reference_writes_and_nothing_else(
    cpu: CpuKernels, dtype: torch.dtype, block_size: int, heads: int, head_dim: int
) -> None:
    pages = 11
    kv = torch.randn(pages, 2, block_size, heads, head_dim).to(dtype)
    slots = torch.randperm(pages * block_size)[: 7 * block_size // 2 + 1]
    keys, values = torch.randn(2, len(slots), heads, head_dim).to(dtype)
    expected = kv.clone()
    REFERENCE.store_kv(expected, keys, values, slots)
    cpu.store_kv(kv, keys, values, slots)
    assert torch.equal(kv, expected)


@KERNELS
def test_store_kv_takes_slices_of_a_fused_projection(cpu: CpuKernels, dtype: torch.dtype) -> None:
    fused = torch.randn(5, 10 * 8).to(dtype)
    keys, values = fused[:, 48:64].view(5, 2, 8), fused[:, 64:].view(5, 2, 8)
    kv = torch.zeros(4, 2, 4, 2, 8, dtype=dtype)
    slots = torch.tensor([15, 0, 6, 7, 8])
    cpu.store_kv(kv, keys, values, slots)
    for row, slot in enumerate(slots.tolist()):
        assert torch.equal(kv[slot // 4, 0, slot % 4], keys[row])
        assert torch.equal(kv[slot // 4, 1, slot % 4], values[row])
