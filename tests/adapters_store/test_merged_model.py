"""All weights of a model with an adapter in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import EMBEDDING, FINAL_NORM, HEAD, BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    Dense,
    Invocation,
    LowRank,
    NormWeight,
    Prefix,
    Scale,
    Side,
    TokenRows,
    TopK,
)
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.merged_model import MergedModel

LayoutOf = Callable[[LlamaForCausalLM], BaseLayout]
V = "model.layers.1.self_attn.v_proj"
NORM = "model.layers.2.post_attention_layernorm"


def merged(layout: BaseLayout, modules: Mapping[str, Sequence[Delta]]) -> MergedModel:
    deltas = {name: tuple(deltas) for name, deltas in modules.items()}
    return MergedModel(Adapter("a", 1, "", "TEST", deltas), layout)


def tensors(model: MergedModel) -> dict[str, Tensor]:
    found = dict(model.tensors())
    assert len(found) == len(model)
    return found


@pytest.fixture
def tied_layout(base_model: LlamaForCausalLM, layout_of: LayoutOf) -> BaseLayout:
    base_model.config.tie_word_embeddings = True
    base_model.tie_weights()
    return layout_of(base_model)


def test_what_the_adapter_leaves_alone_is_the_bases_own(
    biased_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    delta = Dense(torch.randn(12, 36))
    found = tensors(merged(layout_of(biased_model), {V: [delta]}))
    state = biased_model.state_dict()
    assert found.keys() == state.keys()
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, state[name])]
    assert changed == [f"{V}.weight"]
    assert torch.equal(found[f"{V}.weight"], state[f"{V}.weight"] + delta.weight)


def test_norms_are_replaced(base_model: LlamaForCausalLM, layout_of: LayoutOf) -> None:
    weights = {NORM: torch.randn(36), FINAL_NORM: torch.randn(36)}
    found = tensors(
        merged(layout_of(base_model), {name: [NormWeight(w)] for name, w in weights.items()})
    )
    assert all(torch.equal(found[f"{name}.weight"], weight) for name, weight in weights.items())


def test_rows_are_replaced_before_other_deltas_change_them(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    layout, ids, rows = layout_of(base_model), torch.tensor([2, 39]), torch.randn(2, 36)
    replaced, scale, vector = TokenRows(ids, rows), 1 + torch.randn(36), torch.randn(36)
    low_rank = LowRank(torch.randn(3, 36), torch.randn(40, 3))
    embedding = [replaced, Scale(scale, Side.OUTPUT), Bias(vector)]
    found = tensors(merged(layout, {EMBEDDING: embedding, HEAD: [replaced, low_rank]}))
    want = layout.weight(EMBEDDING).clone()
    want[ids] = rows
    torch.testing.assert_close(found["model.embed_tokens.weight"], want * scale + vector)
    want = layout.weight(HEAD).clone()
    want[ids] = rows
    torch.testing.assert_close(found["lm_head.weight"], want + low_rank.dense())


def test_a_low_rank_change_of_the_embedding_is_transposed_into_it(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    layout, low_rank = layout_of(base_model), LowRank(torch.randn(3, 40), torch.randn(36, 3))
    found = tensors(merged(layout, {EMBEDDING: [low_rank]}))
    want = layout.weight(EMBEDDING) + (low_rank.b @ low_rank.a).T
    torch.testing.assert_close(found["model.embed_tokens.weight"], want)


def test_a_tied_head_stays_tied_unless_only_one_end_changes(tied_layout: BaseLayout) -> None:
    ids = torch.tensor([1, 5])
    rows = TokenRows(ids, torch.randn(2, 36))
    same, other = TokenRows(ids.clone(), rows.rows.clone()), TokenRows(ids, torch.randn(2, 36))
    assert merged(tied_layout, {V: [Dense(torch.randn(12, 36))]}).tied
    alike = merged(tied_layout, {EMBEDDING: [rows], HEAD: [same]})
    assert alike.tied
    assert "lm_head.weight" not in tensors(alike)
    for modules in (
        {EMBEDDING: [rows]},
        {HEAD: [rows]},
        {EMBEDDING: [rows], HEAD: [other]},
        {EMBEDDING: [rows], HEAD: [rows, Scale(torch.ones(40), Side.OUTPUT)]},
    ):
        assert not merged(tied_layout, modules).tied


def test_an_untied_head_is_the_bases_where_only_the_embedding_changes(
    tied_layout: BaseLayout,
) -> None:
    rows = TokenRows(torch.tensor([0]), torch.randn(1, 36))
    found = tensors(merged(tied_layout, {EMBEDDING: [rows]}))
    assert torch.equal(found["lm_head.weight"], tied_layout.weight(HEAD))
    assert torch.equal(found["lm_head.weight"][1:], found["model.embed_tokens.weight"][1:])
    assert torch.equal(found["model.embed_tokens.weight"][0], rows.rows[0])


def test_a_bias_that_the_base_has_not_is_among_the_tensors(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    vector = torch.randn(12)
    model = merged(layout_of(base_model), {V: [Bias(vector)]})
    assert model.biased == {V}
    assert torch.equal(tensors(model)[f"{V}.bias"], vector)


UNMERGEABLE: dict[str, tuple[str, Delta]] = {
    "TopK": (V, TopK(torch.randn(4, 36), torch.randn(12, 4), torch.zeros(4), 2)),
    "Prefix": ("model", Prefix(torch.randn(3, 2, 5, 1, 12))),
    "Invocation": ("model", Invocation((3,))),
}


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_kinds_that_no_weight_amounts_to_are_refused_by_name(kind: str, layout: BaseLayout) -> None:
    module, delta = UNMERGEABLE[kind]
    with pytest.raises(InvalidAdapterError, match=f"kind {kind} .*serve the adapter as it is"):
        merged(layout, {module: [delta]})
