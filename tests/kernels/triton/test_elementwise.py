"""What is done to each token for itself, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polydelta.kernels.reference import ReferenceKernels
from polydelta.kernels.triton import elementwise

REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Largest error allowed, as a share of the largest value. The interpreter cuts bfloat16 off where
# hardware rounds: each of up to three roundings differs by up to 2**-7 then.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 1e-3}
# Rows and columns: one tile exactly, less than one, a bit more, many rows of few columns.
SIZES = [(1, 1), (3, 4096), (2, 1030), (5, 33), (70, 16), (9, 2048)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def near(got: Tensor, expected: Tensor, computed: torch.dtype | None = None) -> None:
    """Same shape and dtype, and no value off by more than a share of the largest one: that of the
    dtype, or of the one that it was computed in."""
    assert got.dtype == expected.dtype
    atol = TOLERANCE[computed or expected.dtype] * float(expected.abs().max())
    torch.testing.assert_close(got.cpu(), expected, rtol=0.0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_the_norm_is_that_of_the_reference(
    device: torch.device, rows: int, size: int, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(rows, size).to(dtype) * 3, torch.randn(size).to(dtype)
    got = elementwise.rms_norm(x.to(device), weight.to(device), 1e-5)
    near(got, REFERENCE.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "size"), [(3, 5, 10), (2, 3, 128), (33, 1, 64)])
def test_heads_are_normed_where_they_lie_between_others(
    device: torch.device, tokens: int, heads: int, size: int, dtype: torch.dtype
) -> None:
    qkv = torch.randn(tokens, heads + 3, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    got = elementwise.rms_norm(qkv.to(device)[:, 1:-2], weight.to(device), 1e-6)
    near(got, REFERENCE.rms_norm(qkv[:, 1:-2], weight, 1e-6))


def test_a_weight_of_a_wider_dtype_widens_the_norm(device: torch.device) -> None:
    x, weight = torch.randn(4, 48).bfloat16(), torch.randn(48)
    got = elementwise.rms_norm(x.to(device), weight.to(device), 1e-5)
    near(got, REFERENCE.rms_norm(x, weight, 1e-5), torch.bfloat16)


def test_rows_of_zeros_are_normed_to_zeros(device: torch.device) -> None:
    x, weight = torch.zeros(3, 40, device=device), torch.ones(40, device=device)
    assert not elementwise.rms_norm(x, weight, 1e-5).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_a_sum_stays_in_place_and_is_normed_as_it_was_rounded(
    device: torch.device, rows: int, size: int, dtype: torch.dtype
) -> None:
    x, y = torch.randn(2, rows, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    total, other = x.to(device, copy=True), y.to(device)
    got = elementwise.add_rms_norm(total, other, weight.to(device), 1e-5)
    near(got, REFERENCE.add_rms_norm(x, y, weight, 1e-5))
    near(total, x)
    assert torch.equal(other.cpu(), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "size"), [(1, 1, 2), (3, 5, 10), (7, 3, 80), (2, 4, 128)]
)
def test_heads_turn_in_place_and_nothing_beside_them(
    device: torch.device, tokens: int, heads: int, size: int, dtype: torch.dtype
) -> None:
    qkv = torch.randn(tokens, heads + 3, size).to(dtype)
    cos, sin = torch.randn(2, tokens, size).to(dtype)
    turned = qkv.to(device, copy=True)
    got = elementwise.rotate(turned[:, 1:-2], cos.to(device), sin.to(device))
    assert got.data_ptr() == turned[:, 1:-2].data_ptr()
    near(got, REFERENCE.rotate(qkv[:, 1:-2], cos, sin))
    for beside in (slice(0, 1), slice(-2, None)):
        assert torch.equal(turned.cpu()[:, beside], qkv[:, beside])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_the_gate_is_the_first_half(
    device: torch.device, rows: int, size: int, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, 2 * size).to(dtype) * 4
    near(elementwise.silu_mul(x.to(device)), REFERENCE.silu_mul(x))


def test_gates_far_from_zero_are_shut_or_open(device: torch.device) -> None:
    x = torch.tensor([[-200.0, 200.0, -90.0, 3.0, 5.0, 7.0]], device=device)
    assert elementwise.silu_mul(x).tolist() == [[0.0, 1000.0, 0.0]]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32])
@pytest.mark.parametrize(("count", "size"), SIZES)
def test_rows_are_gathered_in_any_order_and_again(
    device: torch.device, count: int, size: int, dtype: torch.dtype
) -> None:
    table = (torch.randn(11, size + 2) * 100).to(dtype)
    rows = torch.randint(11, (count,))
    got = elementwise.gather(table.to(device)[:, 1:-1], rows.to(device))
    assert torch.equal(got.cpu(), table[:, 1:-1][rows])


def test_no_rows_give_no_rows(device: torch.device) -> None:
    x, weight = torch.empty(0, 24, device=device), torch.ones(24, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert elementwise.rms_norm(x, weight, 1e-5).shape == (0, 24)
    assert elementwise.add_rms_norm(x, x, weight, 1e-5).shape == (0, 24)
    assert elementwise.rotate(x.view(0, 3, 8), x[:, :8], x[:, :8]).shape == (0, 3, 8)
    assert elementwise.silu_mul(x).shape == (0, 12)
    assert elementwise.gather(torch.ones(2, 24, device=device), none).shape == (0, 24)


def test_what_is_not_dense_in_its_last_axis_is_refused(device: torch.device) -> None:
    x, weight = torch.ones(6, 4, device=device).t(), torch.ones(6, device=device)
    with pytest.raises(ValueError, match="last axis must be dense"):
        elementwise.rms_norm(x, weight, 1e-5)
