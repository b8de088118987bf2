"""Our own bfloat16 operations against float64, and each row alone against itself among others.

What is summed in float32 and rounded once is off by half a unit in the last place, and by what the
sum loses: the bounds here are no wider.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.panels import PanelLinear
from polydelta.kernels.reference import ReferenceKernels

WithThreads = Callable[[int], Bfloat16Kernels]

REFERENCE = ReferenceKernels()
# Half a unit in the last place of bfloat16, as a share of a number, and what float32 may lose.
HALF_UNIT, LOST = 2.0**-8, 1e-6
# One, less than a tile, a tile and one more, less and more than FEW_ROWS, blocks of 96 and more.
ROWS = pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 17, 48, 49, 97, 130, 300])
# Rows that a batch of 130 is cut into; each part must have the bits of the whole.
PARTS = [1, 5, 17, 3, 49, 55]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bf(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def rounded_once(got: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """expected: float64; magnitude: of what was summed, like it."""
    assert got.shape == expected.shape
    unit = HALF_UNIT if got.dtype == torch.bfloat16 else 0.0
    bound = unit * expected.abs() * 1.001 + LOST * magnitude
    error = (got.double() - expected).abs()
    # Not `error > bound`: a NaN is an error too.
    assert bool((error <= bound).all()), f"off by up to {float((error - bound).max()):.3g}"


def check_parts(compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """compute: of some rows, what it makes of each; all bits are the same alone."""
    together = compute(x.clone()).clone()
    start = 0
    for count in PARTS:
        rows = slice(start, start + count)
        assert torch.equal(compute(x[rows].clone()), together[rows])
        start += count
    assert start == len(x)


@ROWS
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(2, 1), (60, 92), (34, 33), (576, 192), (1536, 65), (128, 1000)]
)
def test_products_are_rounded_once(
    ours: Bfloat16Kernels, rows: int, inputs: int, outputs: int
) -> None:
    x, weight, bias = bf(rows, inputs), bf(outputs, inputs), bf(outputs)
    expected = F.linear(x.double(), weight.double(), bias.double())
    magnitude = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    linear, head = ours.linear(weight, bias), ours.head(weight)
    assert isinstance(linear, PanelLinear)
    assert isinstance(head, PanelLinear)
    got = linear(x)
    assert got.dtype == torch.bfloat16
    rounded_once(got, expected, magnitude)
    logits = head(x)
    assert logits.dtype == torch.float32
    rounded_once(logits, expected - bias.double(), magnitude)


@pytest.mark.parametrize("outputs", [32 * 40 + 5, 32 * 300 + 1])
def test_wide_layers_are_shared_in_larger_items(ours: Bfloat16Kernels, outputs: int) -> None:
    x, weight = bf(7, 32), bf(outputs, 32)
    magnitude = F.linear(x.double().abs(), weight.double().abs())
    rounded_once(ours.linear(weight, None)(x), F.linear(x.double(), weight.double()), magnitude)


def test_a_product_reads_rows_of_a_wider_tensor(ours: Bfloat16Kernels) -> None:
    weight = bf(70, 40).t()[:, 3:33]  # neither axis dense
    linear = ours.linear(weight, None)
    for x in bf(20, 47)[::2, 5:35], bf(9, 30).expand(9, 30), bf(1, 30).expand(6, 30):
        expected = F.linear(x.double(), weight.double())
        rounded_once(linear(x), expected, F.linear(x.double().abs(), weight.double().abs()))


def test_an_odd_number_of_columns_is_left_to_torch(ours: Bfloat16Kernels) -> None:
    x, weight = bf(5, 33), bf(7, 33)
    expected = F.linear(x.double(), weight.double())
    for linear in ours.linear(weight, None), ours.head(weight):
        assert not isinstance(linear, PanelLinear)
        torch.testing.assert_close(linear(x).double(), expected, rtol=1e-2, atol=1e-2)


def test_no_rows_make_no_rows(ours: Bfloat16Kernels) -> None:
    """A step of which no sequence gets a token."""
    none = bf(3, 8)[:0]
    assert ours.linear(bf(5, 8), None)(none).shape == (0, 5)
    assert ours.head(bf(5, 8))(ours.rms_norm(none, bf(8), 1e-5)).shape == (0, 5)
    assert ours.gather(bf(4, 8), torch.zeros(0, dtype=torch.int64)).shape == (0, 8)
    assert ours.silu_mul(none).shape == (0, 4)
    assert ours.add(none, none).shape == (0, 8)


@ROWS
@pytest.mark.parametrize("size", [1, 15, 16, 100, 576])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norms_are_rounded_once(ours: Bfloat16Kernels, rows: int, size: int, eps: float) -> None:
    x, weight = bf(rows, size) * 0.1, bf(size)
    wide = x.double()
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    expected = wide * factor * weight.double()
    rounded_once(ours.rms_norm(x, weight, eps), expected, expected.abs())


def test_norms_of_heads_read_a_slice_of_a_fused_projection(ours: Bfloat16Kernels) -> None:
    fused, weight = bf(37, 7 * 40), bf(40)
    heads = fused.view(37, 7, 40)[:, 2:5]
    expected = REFERENCE.rms_norm(heads.double(), weight.double(), 1e-5)
    rounded_once(ours.rms_norm(heads, weight, 1e-5), expected, expected.abs())


@ROWS
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 10), (5, 96), (9, 64)])
def test_rotation_is_rounded_once_and_keeps_the_other_heads(
    ours: Bfloat16Kernels, rows: int, heads: int, size: int
) -> None:
    fused, cos, sin = bf(rows, heads + 2, size), bf(rows, size), bf(rows, size)
    before = fused.clone()
    x = fused[:, 1 : 1 + heads]
    wide = x.double()
    expected = REFERENCE.rotate(wide, cos.double(), sin.double())
    magnitude = REFERENCE.rotate(wide.abs(), cos.double().abs(), sin.double().abs())
    rounded_once(ours.rotate(x, cos, sin), expected, magnitude)
    assert torch.equal(fused[:, [0, -1]], before[:, [0, -1]])


@ROWS
@pytest.mark.parametrize("width", [1, 46, 1536])
def test_silu_mul_is_rounded_once(ours: Bfloat16Kernels, rows: int, width: int) -> None:
    x = bf(rows, 2 * width) * 3
    gate, up = x.double().chunk(2, -1)
    expected = F.silu(gate) * up
    rounded_once(ours.silu_mul(x), expected, expected.abs())


def test_the_exponential_of_silu_holds_from_minus_to_plus_100(ours: Bfloat16Kernels) -> None:
    gate = torch.cat((torch.linspace(-100, 100, 40001), torch.tensor([0.0, -0.0, 88.5, -88.5])))
    gate = gate.bfloat16()
    expected = F.silu(gate.double())
    got = ours.silu_mul(torch.stack((gate, torch.ones_like(gate)), 1))[:, 0]
    # Beyond -87 it is some 1e-37, where the truth is nearer to zero still.
    rounded_once(got, expected, expected.abs() + 1e-30)


def test_addition_is_torchs_bit_for_bit(ours: Bfloat16Kernels) -> None:
    for rows, size in (1, 1), (3, 33), (130, 576), (1, 16384), (1, 16385):
        x, y = bf(rows, size), bf(rows, size) * 7
        expected = (x.float() + y.float()).bfloat16()
        got = ours.add(x, y)
        assert got is x
        assert torch.equal(x, expected)


@ROWS
def test_gathered_rows_are_the_tables(ours: Bfloat16Kernels, rows: int) -> None:
    table, wanted = bf(29, 21), torch.randint(0, 29, (rows,))
    assert torch.equal(ours.gather(table, wanted), table[wanted])


@pytest.mark.parametrize("block_size", [1, 7, 16, 32])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (3, 80), (2, 5)])
def test_stored_keys_and_values_lie_where_the_reference_puts_them(
    ours: Bfloat16Kernels, block_size: int, heads: int, head_dim: int
) -> None:
    pages = 19
    kv = bf(pages, 2, block_size, heads, head_dim)
    slots = torch.randperm(pages * block_size)[: 8 * block_size + 3]
    fused = bf(len(slots), 2 * heads + 1, head_dim)
    keys, values = fused[:, 1 : 1 + heads], fused[:, 1 + heads :]
    expected = kv.clone()
    REFERENCE.store_kv(expected, keys, values, slots)
    ours.store_kv(kv, keys, values, slots)
    assert torch.equal(kv, expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(60, 92), (576, 33), (34, 1300)])
def test_a_row_of_a_product_has_the_same_bits_alone(
    ours: Bfloat16Kernels, inputs: int, outputs: int
) -> None:
    weight, bias = bf(outputs, inputs), bf(outputs)
    check_parts(ours.linear(weight, bias), bf(130, inputs))
    check_parts(ours.head(weight), bf(130, inputs))


def test_a_row_of_what_is_between_products_has_the_same_bits_alone(ours: Bfloat16Kernels) -> None:
    weight, cos, sin = bf(50), bf(1, 50), bf(1, 50)
    check_parts(lambda x: ours.rms_norm(x, weight, 1e-5), bf(130, 50))
    check_parts(lambda x: ours.rms_norm(x, weight, 1e-5), bf(130, 3, 50))
    check_parts(ours.silu_mul, bf(130, 2 * 45))
    check_parts(
        lambda x: ours.rotate(x, cos.expand(len(x), -1).clone(), sin.expand(len(x), -1).clone()),
        bf(130, 3, 50),
    )


@pytest.mark.parametrize("rows", [1, 5, 17, 130])
def test_the_number_of_threads_changes_no_bit(with_threads: WithThreads, rows: int) -> None:
    x, weight, scale = bf(rows, 90), bf(700, 90), bf(90)
    first, *others = [
        (
            kernels.linear(weight, None)(x),
            kernels.head(weight)(x),
            kernels.rms_norm(x, scale, 1e-5),
            kernels.silu_mul(x),
        )
        for kernels in map(with_threads, (1, 2, 3))
    ]
    for other in others:
        assert all(map(torch.equal, first, other))


def test_what_is_not_bfloat16_is_left_to_torch(ours: Bfloat16Kernels) -> None:
    x, weight, gain = torch.randn(5, 8), torch.randn(6, 8), torch.randn(8)
    expected = REFERENCE.linear(weight, None)(x)
    torch.testing.assert_close(ours.linear(weight, None)(x), expected)
    torch.testing.assert_close(ours.head(weight)(x), expected)
    torch.testing.assert_close(ours.rms_norm(x, gain, 1e-5), REFERENCE.rms_norm(x, gain, 1e-5))
    torch.testing.assert_close(ours.silu_mul(x), REFERENCE.silu_mul(x))
    cos, sin, heads = torch.randn(5, 4), torch.randn(5, 4), x.view(5, 2, 4)
    torch.testing.assert_close(ours.rotate(heads, cos, sin), REFERENCE.rotate(heads, cos, sin))
    assert torch.equal(ours.gather(weight, torch.tensor([4, 1])), weight[[4, 1]])
    assert torch.equal(ours.add(x.clone(), x), 2 * x)
