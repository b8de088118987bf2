"""The table of formats: complete, in order, and true of the adapters that stand for its rows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from polydelta.adapters_store.base_layout import EMBEDDING, BaseLayout
from polydelta.adapters_store.delta import Columns, LowRank, Scale, Side, Sparse, TokenRows
from polydelta.adapters_store.delta_kinds import KINDS
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.format_table import FORMAT_ROWS, FormatRow, usual_adapter
from polydelta.adapters_store.formats.refusals import REFUSALS
from polydelta.adapters_store.formats.registry import FORMATS
from polydelta.adapters_store.packing import pack

every_row = pytest.mark.parametrize("row", FORMAT_ROWS, ids=lambda row: row.formats[0])


def row_of(format: str) -> FormatRow:
    return next(row for row in FORMAT_ROWS if format in row.formats)


def test_every_format_that_is_read_is_in_one_row_and_no_other_is_named() -> None:
    names = Counter(name for row in FORMAT_ROWS for name in row.formats)
    plain = {name for name in names if " " not in name}
    assert set(names.values()) == {1}
    assert plain == FORMATS.keys()
    assert {name.split()[0] for name in names} == FORMATS.keys()
    assert plain.isdisjoint(REFUSALS)


def test_rows_are_in_the_order_of_their_kinds() -> None:
    # Those of one kind before those that have others besides.
    orders = [[KINDS.index(kind) for kind in row.kinds] for row in FORMAT_ROWS]
    firsts = [(order[0], len(order) > 1) for order in orders]
    assert firsts == sorted(firsts)
    assert all(order == sorted(order) for order in orders)


@every_row
def test_a_usual_adapter_has_the_kinds_of_its_row(row: FormatRow, layout: BaseLayout) -> None:
    assert set(usual_adapter(row, layout, seed=0).kinds) == set(row.kinds)


@every_row
def test_a_usual_adapter_fits_the_base_if_its_row_is_served(
    row: FormatRow, layout: BaseLayout
) -> None:
    adapter = usual_adapter(row, layout, seed=0)
    if row.served:
        assert pack(adapter, layout, torch.bfloat16).digest == adapter.digest
    else:
        with pytest.raises(InvalidAdapterError, match="adapters convert"):
            pack(adapter, layout, torch.bfloat16)


def test_usual_adapters_of_one_seed_are_the_same_and_of_others_differ(layout: BaseLayout) -> None:
    first, again, other = (usual_adapter(row_of("LORA"), layout, seed) for seed in (3, 3, 4))
    name = "model.layers.2.self_attn.v_proj"
    (a,), (b,), (c,) = first.modules[name], again.modules[name], other.modules[name]
    assert isinstance(a, LowRank)
    assert isinstance(b, LowRank)
    assert isinstance(c, LowRank)
    assert torch.equal(a.b, b.b)
    assert not torch.equal(a.b, c.b)
    assert first.digest == again.digest != other.digest


def test_a_usual_adapter_has_the_modules_of_its_row(layout: BaseLayout) -> None:
    adapter = usual_adapter(row_of("IA3"), layout, seed=0)
    layers = [f"model.layers.{layer}" for layer in range(layout.num_layers)]
    ends = ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    assert adapter.modules.keys() == {f"{layer}.{end}" for layer in layers for end in ends}
    for name, (delta,) in adapter.modules.items():
        assert isinstance(delta, Scale)
        assert delta.side is (Side.INPUT if name.endswith("down_proj") else Side.OUTPUT)


def test_entries_columns_and_tokens_are_as_many_as_wanted_and_differ(layout: BaseLayout) -> None:
    name = "model.layers.0.mlp.down_proj"
    out_features, in_features = layout.module_shapes[name]
    (sparse,) = usual_adapter(row_of("SFT"), layout, seed=1).modules[name]
    assert isinstance(sparse, Sparse)
    assert sparse.nnz == int(0.08 * out_features * in_features)
    assert sparse.dense().count_nonzero() == sparse.nnz
    (columns,) = usual_adapter(row_of("PACA"), layout, seed=1).modules[name]
    assert isinstance(columns, Columns)
    assert len(columns.indices.unique()) == columns.block.shape[1] == 8
    (rows,) = usual_adapter(row_of("TRAINABLE_TOKENS"), layout, seed=1).modules[EMBEDDING]
    assert isinstance(rows, TokenRows)
    assert len(rows.ids.unique()) == len(rows.rows) == 16
    assert rows.ids.max() < layout.vocab_size
