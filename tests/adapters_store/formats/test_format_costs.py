"""Costs of usual adapters, against those that are packed whole, and counted by hand."""

from __future__ import annotations

import pytest
import torch

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.delta import (
    Bias,
    Circulant,
    Columns,
    Delta,
    Kronecker,
    LowRank,
    NormWeight,
    OneBit,
    Rotate,
    Rows,
    Scale,
    Side,
    Sparse,
    TokenRows,
    TopK,
)
from polydelta.adapters_store.formats.format_costs import base_multiply_adds, cost, multiply_adds
from polydelta.adapters_store.formats.format_table import FORMAT_ROWS, FormatRow, usual_adapter
from polydelta.adapters_store.packing import pack

LINEAR = "model.layers.0.mlp.up_proj"
# Of a layer with 6 outputs and 10 inputs, unless it says so.
COUNTED: list[tuple[str, Delta, int]] = [
    (LINEAR, LowRank(torch.ones(3, 10), torch.ones(6, 3)), 30 + 18),
    (
        LINEAR,
        Sparse((6, 10), torch.arange(7).int(), torch.arange(6).int(), torch.ones(6)),
        6,
    ),
    (LINEAR, Columns(10, torch.arange(4).int(), torch.ones(6, 4)), 24),
    (LINEAR, Rows(6, torch.arange(2).int(), torch.ones(2, 10)), 20),
    (LINEAR, OneBit(10, torch.ones(6, 2, dtype=torch.uint8), 0.5), 60),
    # 3 rows of 5 times [4, 5], then [2, 3] times 3 rows of 4.
    (LINEAR, Kronecker(torch.ones(2, 3), torch.ones(4, 5)), 60 + 24),
    (LINEAR, Circulant(torch.ones(3, 5, 2)), 60),
    (LINEAR, TopK(torch.ones(4, 10), torch.ones(6, 4), torch.ones(4), 2), 40 + 12),
    (LINEAR, Scale(torch.ones(10), Side.INPUT), 10),
    (LINEAR, Rotate(torch.ones(6), torch.ones(6), torch.arange(6).int()), 12),
    (LINEAR, Bias(torch.ones(6)), 6),
    ("model.norm", NormWeight(torch.ones(10)), 0),
    (HEAD, TokenRows(torch.arange(3), torch.ones(3, 10)), 30),
    (EMBEDDING, TokenRows(torch.arange(3), torch.ones(3, 10)), 0),
]


@pytest.mark.parametrize(
    ("module", "delta", "expected"), COUNTED, ids=lambda value: getattr(value, "kind", None)
)
def test_multiply_adds_are_those_counted_by_hand(module: str, delta: Delta, expected: int) -> None:
    assert multiply_adds(module, delta) == expected


@pytest.mark.parametrize(
    "row", [row for row in FORMAT_ROWS if row.served], ids=lambda row: row.formats[0]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_those_of_an_adapter_that_is_packed_whole(
    row: FormatRow, dtype: torch.dtype, layout: BaseLayout
) -> None:
    packed = pack(usual_adapter(row, layout, seed=5), layout, dtype)
    tokens = packed.traits.num_prefix_tokens
    weights = sum(layer.data.numel() for layer in packed.layers)
    kv = tokens * layout.num_layers * 2 * layout.num_kv_heads * layout.head_dim * dtype.itemsize
    spent = cost(row, layout, dtype)
    assert (spent.nbytes, spent.prefix_tokens) == (weights + kv, tokens)


def test_costs_are_of_all_blocks(layout: BaseLayout) -> None:
    lora = next(row for row in FORMAT_ROWS if "LORA" in row.formats)
    targets = [
        shape for name, shape in layout.module_shapes.items() if name.endswith(("q_proj", "v_proj"))
    ]
    assert len(targets) == 2 * layout.num_layers
    expected = sum(8 * (outputs + inputs) for outputs, inputs in targets)
    assert cost(lora, layout, torch.float32).multiply_adds == expected
    full = sum(outputs * inputs for outputs, inputs in layout.module_shapes.values())
    assert base_multiply_adds(layout) == full
