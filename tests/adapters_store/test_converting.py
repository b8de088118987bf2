"""Adapters of every kind as LoRAs, as PEFT computes them from the files that are written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.converting import ConvertedAdapter, to_low_rank
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Circulant,
    Columns,
    Delta,
    Dense,
    Invocation,
    Kronecker,
    LowRank,
    NormWeight,
    OneBit,
    Prefix,
    Prompt,
    Rotate,
    Rows,
    Scale,
    Side,
    Sparse,
    TokenRows,
    TopK,
)
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_writer import write_adapter
from polydelta.adapters_store.merged_weight import merge_into
from polydelta.adapters_store.nearest_low_rank import Truncation

LayoutOf = Callable[[LlamaForCausalLM], BaseLayout]

UP, DOWN, Q, K = (
    "model.layers.1.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.2.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
)
TOKENS = torch.tensor([[1, 7, 30, 2, 39, 0, 11]])
WHOLE = Truncation(rank=1000)


@pytest.fixture(autouse=True)
def lively(base_model: LlamaForCausalLM, biased_model: LlamaForCausalLM) -> None:
    """Weights that are not so small that a wrong one would go unnoticed in the logits."""
    with torch.no_grad():
        for model in (base_model, biased_model):
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(8)


def adapter_of(modules: Mapping[str, Sequence[Delta]]) -> Adapter:
    return Adapter("a", 1, "", "TEST", {name: tuple(deltas) for name, deltas in modules.items()})


def every_kind(out_features: int, in_features: int) -> dict[str, Delta]:
    """Deltas with a weight, for a layer of this shape; both sizes are multiples of 4."""
    entries = torch.zeros(out_features + 1, dtype=torch.int32)
    entries[3:] = 2
    return {
        "LowRank": LowRank(torch.randn(3, in_features), torch.randn(out_features, 3) * 0.1),
        "Sparse": Sparse(
            (out_features, in_features),
            entries,
            torch.tensor([1, 5], dtype=torch.int32),
            torch.tensor([0.7, -0.4]),
        ),
        "Columns": Columns(
            in_features, torch.tensor([0, 9], dtype=torch.int32), torch.randn(out_features, 2)
        ),
        "Rows": Rows(
            out_features, torch.tensor([4], dtype=torch.int32), torch.randn(1, in_features)
        ),
        "OneBit": OneBit(
            in_features,
            torch.randint(0, 256, (out_features, -(-in_features // 8)), dtype=torch.uint8),
            0.03,
        ),
        "Kronecker": Kronecker(
            torch.randn(out_features // 4, 2) * 0.1, torch.randn(4, in_features // 2) * 0.1
        ),
        "Circulant": Circulant(torch.randn(out_features // 4, in_features // 4, 4) * 0.1),
        "Dense": Dense(torch.randn(out_features, in_features) * 0.1),
        "InputScale": Scale(1 + 0.3 * torch.randn(in_features), Side.INPUT),
        "OutputScale": Scale(1 + 0.3 * torch.randn(out_features), Side.OUTPUT),
        "Rotate": Rotate(
            1 + 0.1 * torch.randn(out_features),
            0.3 * torch.randn(out_features),
            torch.arange(out_features, dtype=torch.int32).view(-1, 2).flip(1).flatten(),
        ),
        "Bias": Bias(torch.randn(out_features)),
    }


def merged_logits(
    model: LlamaForCausalLM, layout: BaseLayout, modules: Mapping[str, Sequence[Delta]]
) -> Tensor:
    """With the deltas written into a copy of the model."""
    merged = copy.deepcopy(model)
    for module, deltas in modules.items():
        weight, bias = merge_into(layout.weight(module), layout.bias(module), deltas)
        linear = merged.get_submodule(module)
        linear.weight = torch.nn.Parameter(weight)
        linear.bias = None if bias is None else torch.nn.Parameter(bias)
    with torch.no_grad():
        return merged(TOKENS).logits


def peft_logits(model: LlamaForCausalLM, folder: Path) -> Tensor:
    peft = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    with torch.no_grad():
        return peft(TOKENS).logits


def write(folder: Path, converted: ConvertedAdapter) -> Path:
    write_adapter(folder, converted.modules, "tiny", torch.float32)
    return folder


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", every_kind(4, 12))
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_peft_computes_from_the_lora_what_the_adapter_does(
    kind: str,
    biased: bool,
    base_model: LlamaForCausalLM,
    biased_model: LlamaForCausalLM,
    layout_of: LayoutOf,
    tmp_path: Path,
) -> None:
    torch.manual_seed(3)
    model = biased_model if biased else base_model
    layout = layout_of(model)
    modules = {name: (every_kind(*layout.module_shapes[name])[kind],) for name in (UP, DOWN, Q, K)}
    converted = to_low_rank(adapter_of(modules), layout, WHOLE)
    assert converted.error < 1e-5
    want = merged_logits(model, layout, modules)
    got = peft_logits(model, write(tmp_path / "lora", converted))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (model(TOKENS).logits - want).abs().max() > 0.02, "the adapter does nothing"


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_several_deltas_of_a_module_are_taken_together(
    biased_model: LlamaForCausalLM, layout_of: LayoutOf, tmp_path: Path
) -> None:
    layout = layout_of(biased_model)
    kinds = every_kind(*layout.module_shapes[UP])
    names = ("Bias", "Sparse", "Rotate", "LowRank", "OutputScale", "InputScale", "LowRank")
    modules = {UP: [kinds[name] for name in names], Q: [every_kind(36, 36)["Columns"]]}
    converted = to_low_rank(adapter_of(modules), layout, WHOLE)
    want = merged_logits(biased_model, layout, modules)
    got = peft_logits(biased_model, write(tmp_path / "lora", converted))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_low_rank_changes_stay_as_they_are(layout: BaseLayout) -> None:
    one, two = (every_kind(*layout.module_shapes[K])["LowRank"] for _ in range(2))
    bias = Bias(torch.randn(12))
    converted = to_low_rank(adapter_of({K: [one, two, bias]}), layout)
    low_rank, kept = converted.modules[K]
    assert isinstance(low_rank, LowRank)
    assert torch.equal(low_rank.a, torch.cat((one.a, two.a)))
    assert torch.equal(low_rank.dense(), torch.cat((one.b, two.b), 1) @ low_rank.a)
    assert torch.equal(kept.vector, bias.vector)
    assert converted.error == 0.0


def test_low_rank_changes_are_cut_down_when_a_rank_is_asked_for(layout: BaseLayout) -> None:
    delta = every_kind(*layout.module_shapes[K])["LowRank"]
    converted = to_low_rank(adapter_of({K: [delta]}), layout, Truncation(rank=1))
    assert converted.by_module[K].change.delta.rank == 1
    u, s, vh = torch.linalg.svd(delta.dense())
    torch.testing.assert_close(
        converted.by_module[K].change.delta.dense(),
        s[0] * u[:, :1] @ vh[:1],
        atol=1e-5,
        rtol=1e-5,
    )
    assert converted.error == pytest.approx(float(s[1:].norm() / s.norm()), rel=1e-4)


def test_without_a_truncation_nine_tenths_of_other_changes_stay(layout: BaseLayout) -> None:
    dense = Dense(torch.randn(layout.module_shapes[DOWN]))
    change = to_low_rank(adapter_of({DOWN: [dense]}), layout).by_module[DOWN].change
    assert 0.2 < change.error <= 0.1**0.5
    assert 1 < change.delta.rank < 36


def test_ranks_and_factors_are_those_of_pefts_own_conversion(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    torch.manual_seed(1)
    loha = LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"], init_weights=False)
    peft = get_peft_model(copy.deepcopy(base_model), loha).eval()
    with torch.no_grad():
        config, state = convert_to_lora(peft, rank=0.8)
        dense = {
            name.removeprefix("base_model.model."): Dense(module.get_delta_weight("default"))
            for name, module in peft.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    modules = {name: (delta,) for name, delta in dense.items()}
    converted = to_low_rank(adapter_of(modules), layout_of(base_model), Truncation(energy=0.8))
    assert len(modules) == 6
    for name, module in converted.by_module.items():
        prefix = f"base_model.model.{name}.lora"
        want = state[f"{prefix}_B.weight"] @ state[f"{prefix}_A.weight"]
        assert module.change.delta.rank == len(state[f"{prefix}_A.weight"])
        torch.testing.assert_close(module.change.delta.dense(), want, atol=1e-5, rtol=1e-4)
    assert config.r >= 1


def test_a_bias_alone_becomes_a_lora_of_rank_1_that_is_zero(
    biased_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    vector = torch.randn(52)
    converted = to_low_rank(adapter_of({UP: [Bias(vector)]}), layout_of(biased_model))
    low_rank, bias = converted.modules[UP]
    assert low_rank.rank == 1
    assert not low_rank.dense().any()
    torch.testing.assert_close(bias.vector, vector, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_low_rank_changes_of_the_embedding_and_the_head_are_kept(
    tied: bool, base_model: LlamaForCausalLM, layout_of: LayoutOf, tmp_path: Path
) -> None:
    if tied:
        base_model.config.tie_word_embeddings = True
        base_model.tie_weights()
    layout = layout_of(base_model)
    embedding = LowRank(torch.randn(2, 40), torch.randn(36, 2))
    head = LowRank(torch.randn(3, 36) * 0.1, torch.randn(40, 3))
    modules = {"model.embed_tokens": (embedding,), "lm_head": (head,)}
    got = peft_logits(
        base_model, write(tmp_path / "lora", to_low_rank(adapter_of(modules), layout))
    )
    with torch.no_grad():
        embedded = base_model.model.embed_tokens(TOKENS) + embedding.a.T[TOKENS] @ embedding.b.T
        hidden = base_model.model(inputs_embeds=embedded).last_hidden_state
        want = hidden @ (base_model.lm_head.weight + head.dense()).T
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_scaled_embedding_is_taken_as_a_linear_layer_over_tokens(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    layout, scale = layout_of(base_model), 1 + torch.randn(36)
    converted = to_low_rank(
        adapter_of({"model.embed_tokens": [Scale(scale, Side.OUTPUT)]}), layout, WHOLE
    )
    weight = layout.weight("model.embed_tokens")
    (change,) = converted.modules["model.embed_tokens"]
    torch.testing.assert_close((weight + change.dense().T), weight * scale, atol=1e-5, rtol=1e-4)


REFUSED: dict[str, tuple[str, Delta]] = {
    "TopK": (Q, TopK(torch.randn(4, 36), torch.randn(36, 4), torch.zeros(4), 2)),
    "Prefix": ("model", Prefix(torch.randn(3, 2, 5, 1, 12))),
    "Prompt": ("model", Prompt(torch.randn(5, 36))),
    "Invocation": ("model", Invocation((3, 4))),
    "NormWeight": ("model.norm", NormWeight(torch.ones(36))),
    "TokenRows": ("lm_head", TokenRows(torch.tensor([3]), torch.randn(1, 36))),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_a_lora_has_no_place_for_are_refused_by_name(
    kind: str, layout: BaseLayout
) -> None:
    module, delta = REFUSED[kind]
    low_rank = every_kind(*layout.module_shapes[Q])["LowRank"]
    deltas = (low_rank, delta) if module == Q else (delta,)
    with pytest.raises(InvalidAdapterError, match=kind):
        to_low_rank(adapter_of({K: [every_kind(12, 36)["LowRank"]], module: deltas}), layout)


def test_a_biased_embedding_goes_into_no_lora(
    base_model: LlamaForCausalLM, layout_of: LayoutOf, tmp_path: Path
) -> None:
    adapter = adapter_of({"model.embed_tokens": [Bias(torch.randn(36))]})
    with pytest.raises(InvalidAdapterError, match="lora_bias does not go with an embedding"):
        write(tmp_path / "lora", to_low_rank(adapter, layout_of(base_model)))


def test_a_change_beyond_float32_is_refused(
    base_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    adapter = adapter_of({Q: [Scale(torch.full((36,), 3e38), Side.OUTPUT)] * 2})
    with pytest.raises(InvalidAdapterError, match=r"beyond what float32 holds"):
        to_low_rank(adapter, layout_of(base_model))


def test_progress_is_told_after_each_module(layout: BaseLayout) -> None:
    told: list[tuple[int, int]] = []
    modules = {name: [every_kind(*layout.module_shapes[name])["Sparse"]] for name in (Q, K, UP)}
    to_low_rank(adapter_of(modules), layout, None, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
