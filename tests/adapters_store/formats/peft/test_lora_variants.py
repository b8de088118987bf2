from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    VeloraConfig,
)
from peft.tuners.lora.variants import BlockDiagonalLinear, QALoraLinearVariant
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, MODEL, BaseLayout
from polydelta.adapters_store.delta import Adapter, Bias, Invocation, LowRank, Scale, Side
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.peft.lora_variants import (
    block_diagonal,
    dora_gains,
    ungroup,
    without_smallest,
)
from polydelta.adapters_store.reference import AdapterRef

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q1 = "model.layers.1.self_attn.q_proj"

VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "DoRA, rank-stabilised, with a rank pattern": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 5},
    },
    "BD-LoRA": {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["o_proj", "down_proj"],
            target_modules_bd_b=["q_proj", "k_proj"],
            nblocks=2,
            match_strict=False,
        )
    },
    "BD-LoRA in four blocks": {
        "target_modules": ["q_proj", "down_proj"],
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["layers.0.self_attn.q_proj", "down_proj"],
            target_modules_bd_b=["layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj"],
            nblocks=4,
        ),
    },
    "KaSA": {"kasa_config": KasaConfig()},
    "KaSA of another rank": {"kasa_config": KasaConfig(), "rank_pattern": {"up_proj": 7}},
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=4)},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig()},
    "MiCA": {"init_lora_weights": "mica"},
    "a bias on B": {"lora_bias": True},
    "a bias on B beside KaSA": {"lora_bias": True, "kasa_config": KasaConfig()},
    "a bias on B beside BD-LoRA": {
        "lora_bias": True,
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["o_proj"],
            target_modules_bd_b=["q_proj"],
            nblocks=2,
            match_strict=False,
        ),
    },
    "a bias on B beside one block": {
        "lora_bias": True,
        "use_bdlora": BdLoraConfig(target_modules_bd_b=["q_proj"], match_strict=False),
    },
    "all biases of the base": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "all biases beside DoRA": {"use_dora": True, "bias": "all", "target_modules": ["k_proj"]},
    "all biases beside a bias on B": {"lora_bias": True, "bias": "all"},
    "bases that are said to be transposed": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("model", ["base_model", "biased_model"])
def test_linear_layers_compute_what_pefts_own_do(
    options: dict[str, Any],
    model: str,
    check_parity: Callable[..., Adapter],
    request: pytest.FixtureRequest,
) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEARS, **options})
    adapter = check_parity(config, request.getfixturevalue(model))
    assert adapter.format == "LORA"
    assert all(any(isinstance(d, LowRank | Bias) for d in m) for m in adapter.modules.values())


def test_biases_are_trained_of_modules_without_a_lora_too(
    check_parity: Callable[..., Adapter], biased_model: LlamaForCausalLM
) -> None:
    adapter = check_parity(LoraConfig(r=2, target_modules=["q_proj"], bias="all"), biased_model)
    assert len(adapter.modules) == 3 * len(LINEARS)
    assert [delta.kind for delta in adapter.modules["model.layers.0.mlp.up_proj"]] == ["Bias"]


def test_dora_scales_the_base_and_keeps_its_bias(
    check_parity: Callable[..., Adapter], biased_model: LlamaForCausalLM
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    adapter = check_parity(config, biased_model)
    low_rank, scale, bias = adapter.modules[Q1]
    assert isinstance(low_rank, LowRank)
    assert isinstance(scale, Scale)
    assert isinstance(bias, Bias)
    assert scale.side is Side.OUTPUT
    own = biased_model.state_dict()[f"{Q1}.bias"]
    torch.testing.assert_close(bias.vector, (1 - scale.vector) * own)


def test_kasa_has_twice_the_rank_for_what_it_takes_from_the_base(
    check_parity: Callable[..., Adapter], base_model: LlamaForCausalLM
) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj"], kasa_config=KasaConfig())
    assert check_parity(config, base_model).max_rank == 6


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 5},
    "DoRA": {"use_dora": True},
    "MiCA": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_embedding_and_head_compute_what_pefts_own_do(
    targets: list[str],
    tied: bool,
    options: dict[str, Any],
    base_model: LlamaForCausalLM,
    make_peft: Callable[..., PeftModel],
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
    tmp_path: Path,
) -> None:
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": targets, **options})
    model = _tied(base_model) if tied else base_model
    peft = make_peft(config, model, std=0.3)
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "adapter"), layout_of(model))
    assert {module.rpartition(".")[2] for module in adapter.modules} == set(targets)
    _check_embedding_and_head(adapter, peft, layout_of(model))


def test_adapters_that_are_tied_change_both(
    base_model: LlamaForCausalLM,
    make_peft: Callable[..., PeftModel],
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
    tmp_path: Path,
) -> None:
    config = LoraConfig(r=3, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = _tied(base_model)
    peft = make_peft(config, model, std=0.3)
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "adapter"), layout_of(model))
    assert adapter.modules.keys() == {EMBEDDING, HEAD}
    _check_embedding_and_head(adapter, peft, layout_of(model))


def _tied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model of the same sizes, whose head is its embedding."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config)


def _check_embedding_and_head(adapter: Adapter, peft: PeftModel, layout: BaseLayout) -> None:
    own = peft.base_model.model
    hidden, tokens = torch.randn(5, layout.hidden_size), torch.arange(layout.vocab_size)
    with torch.no_grad():
        table, logits = own.model.embed_tokens(tokens), own.lm_head(hidden)
    # The embedding as a linear layer over token ids: [hidden, vocab].
    got = _change(layout.weight(EMBEDDING).T, adapter.modules.get(EMBEDDING, ()))
    torch.testing.assert_close(got.T, table, atol=1e-4, rtol=1e-4)
    got = _change(layout.weight(HEAD), adapter.modules.get(HEAD, ()))
    torch.testing.assert_close(hidden @ got.T, logits, atol=1e-4, rtol=1e-4)


def _change(weight: Tensor, deltas: tuple[Any, ...]) -> Tensor:
    scale = [delta.vector for delta in deltas if isinstance(delta, Scale)]
    changes = [delta.dense() for delta in deltas if isinstance(delta, LowRank)]
    assert len(scale) + len(changes) == len(deltas)
    return sum(changes, weight * scale[0].unsqueeze(1) if scale else weight)


def test_activated_lora_has_its_tokens_beside_plain_changes(
    make_peft: Callable[..., PeftModel],
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
    tmp_path: Path,
) -> None:
    options = {"r": 2, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    make_peft(LoraConfig(**options, alora_invocation_tokens=[7, 3, 7]), base_model, "alora")
    make_peft(LoraConfig(**options), base_model, "plain")
    layout = layout_of(base_model)
    adapter = read_adapter(AdapterRef("alora", 1, tmp_path / "alora"), layout)
    plain = read_adapter(AdapterRef("plain", 1, tmp_path / "plain"), layout)
    (invocation,) = adapter.modules[MODEL]
    assert isinstance(invocation, Invocation)
    assert invocation.token_ids == (7, 3, 7)
    assert adapter.modules.keys() - plain.modules.keys() == {MODEL}
    assert adapter.kinds == ("Invocation", "LowRank")


def test_activated_lora_acts_as_pefts_own_from_its_tokens_on(
    make_peft: Callable[..., PeftModel],
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
    tmp_path: Path,
) -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7, 3]
    )
    peft = make_peft(config, base_model, std=0.3)
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "adapter"), layout_of(base_model))
    (delta,) = adapter.modules[Q1]
    assert isinstance(delta, LowRank)
    x = torch.randn(1, 6, 36)
    with torch.no_grad():
        # As PEFT calls its layer for the sequence 9 7 3 9 9 9.
        want = peft.base_model.model.get_submodule(Q1)(x, alora_offsets=[5])
        base = base_model.get_submodule(Q1)(x)
    torch.testing.assert_close(want[:, 0], base[:, 0], atol=0, rtol=0)
    torch.testing.assert_close(want[:, 1:], (base + x @ delta.dense().T)[:, 1:])


@pytest.mark.parametrize("group", [2, 3, 9])
def test_grouped_inputs_are_pefts_pooled_ones(
    group: int, base_model: LlamaForCausalLM, make_peft: Callable[..., PeftModel]
) -> None:
    peft = make_peft(LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]), base_model)
    layer = peft.base_model.model.get_submodule(Q1)
    # PEFT has this variant for GPTQ layers alone, but it does not look at the base layer.
    config = LoraConfig(r=2, qalora_group_size=group)
    QALoraLinearVariant.init(layer, "default", config=config)
    x = torch.randn(5, 36)
    with torch.no_grad():
        result = torch.zeros(5, 36)
        want = QALoraLinearVariant.forward(layer, "default", x, result)
        a = ungroup(layer.lora_A["default"].weight, group)
        got = x @ a.T @ layer.lora_B["default"].weight.T * 2.5
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_blocks_lie_as_in_pefts_layer() -> None:
    layer = BlockDiagonalLinear(12, 6, nblocks=3)
    x = torch.randn(5, 12)
    with torch.no_grad():
        got = x @ block_diagonal(layer.weight, 3).T
        torch.testing.assert_close(got, layer(x))


@pytest.mark.parametrize("shape", [(7, 11), (11, 7)])
def test_what_kasa_takes_away_are_the_smallest_singular_values(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    a, b = without_smallest(weight, 3)
    assert (a.shape, b.shape) == ((3, shape[1]), (shape[0], 3))
    kept = torch.linalg.svdvals(weight + b @ a)
    torch.testing.assert_close(kept[:4], torch.linalg.svdvals(weight)[:4])
    torch.testing.assert_close(kept[4:], torch.zeros(3), atol=1e-5, rtol=0)


def test_gains_give_rows_their_trained_lengths() -> None:
    magnitude, weight, change = torch.rand(5) + 1, torch.randn(5, 9), torch.randn(5, 9)
    gains = dora_gains(magnitude, weight, change)
    lengths = (gains.unsqueeze(1) * (weight + change)).norm(dim=1)
    torch.testing.assert_close(lengths, magnitude)
