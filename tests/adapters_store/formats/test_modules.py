from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.delta import Adapter, NormWeight, TokenRows
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.modules import outline_adapter
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.merged_weight import merge_into
from polydelta.adapters_store.reference import AdapterRef

PREFIX = "base_model.model."
Q1 = "model.layers.1.self_attn.q_proj"
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
BOTH = ["embed_tokens", "lm_head"]


def tied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model of the same sizes, whose head is its embedding."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config)


@pytest.fixture
def tied_model(base_model: LlamaForCausalLM) -> LlamaForCausalLM:
    return tied(base_model)


def tokens(*indices: int, of_head: list[int] | None = None, **options: Any) -> PeftConfig:
    """A LoRA beside which rows of these tokens are trained."""
    chosen = list(indices) if of_head is None else {"embed_tokens": [*indices], "lm_head": of_head}
    return LoraConfig(**{**LORA, "trainable_token_indices": chosen, **options})


# Which model, and what is trained over it.
TRAINED: dict[str, tuple[str, PeftConfig]] = {
    "saved modules of each kind": (
        "biased_model",
        LoraConfig(**LORA, modules_to_save=[*BOTH, "norm", "o_proj", "down_proj"]),
    ),
    "a saved block, and all biases": (
        "biased_model",
        LoraConfig(**LORA, modules_to_save=["layers.0.mlp", "v_proj"], bias="all"),
    ),
    "saved modules of a tied base": ("tied_model", LoraConfig(**LORA, modules_to_save=BOTH)),
    "the saved embedding of a tied base": (
        "tied_model",
        LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    ),
    "the saved head of a tied base": (
        "tied_model",
        LoraConfig(**LORA, modules_to_save=["lm_head"]),
    ),
    "saved modules that are kept tied": (
        "tied_model",
        LoraConfig(**LORA, modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "saved modules beside IA3": (
        "base_model",
        IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            modules_to_save=["model.norm", "lm_head"],
        ),
    ),
    "a saved head beside norms": ("base_model", LNTuningConfig(modules_to_save=["lm_head"])),
    "saved modules beside a prompt": (
        "base_model",
        PromptTuningConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM", modules_to_save=["norm", "lm_head"]
        ),
    ),
    "trained tokens": ("base_model", tokens(31, 3, 7)),
    "trained tokens of a tied base": ("tied_model", tokens(31, 3, 7)),
    "trained tokens of the head": (
        "base_model",
        LoraConfig(**LORA, trainable_token_indices={"lm_head": [5, 2]}),
    ),
    "trained tokens of a tied base's head": (
        "tied_model",
        LoraConfig(**LORA, trainable_token_indices={"lm_head": [5, 2]}),
    ),
    "tokens of both": ("base_model", tokens(3, 1, of_head=[2])),
    "tokens of both of a tied base": ("tied_model", tokens(3, 1, of_head=[2])),
    "the same tokens of both of a tied base": ("tied_model", tokens(3, 1, of_head=[3, 1])),
    "trained tokens beneath a LoRA of the head": (
        "tied_model",
        tokens(3, 1, target_modules=["lm_head"]),
    ),
    "trained tokens beside a saved head": ("base_model", tokens(3, 1, modules_to_save=["lm_head"])),
    "tokens alone": ("base_model", TrainableTokensConfig(token_indices=[31, 3, 7])),
    "tokens alone of a tied base": ("tied_model", TrainableTokensConfig(token_indices=[31, 3])),
    "tokens alone of both": (
        "base_model",
        TrainableTokensConfig(token_indices=[31, 3], target_modules=BOTH),
    ),
    "tokens alone of a tied base's head": (
        "tied_model",
        TrainableTokensConfig(token_indices=[31, 3], target_modules=["lm_head"]),
    ),
}


@pytest.mark.parametrize("embeddings_too", [False, True])
@pytest.mark.parametrize(("model", "config"), TRAINED.values(), ids=TRAINED.keys())
def test_every_module_computes_what_pefts_own_does(
    model: str,
    config: PeftConfig,
    embeddings_too: bool,
    make_peft: Callable[..., PeftModel],
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    base = request.getfixturevalue(model)
    peft = make_peft(config, base)
    if embeddings_too:
        peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "adapter"), layout_of(base))
    changed = check_all(adapter, tmp_path / "adapter", base, layout_of(base))
    assert changed == adapter.modules.keys() - {"model"}


FINE_TUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "neither": ("base_model", {}),
    "the embedding": ("base_model", {"target_modules": ["embed_tokens"]}),
    "the head": ("base_model", {"target_modules": ["lm_head"]}),
    "neither of a tied base": ("tied_model", {}),
    "a tied base's embedding": ("tied_model", {"target_modules": ["embed_tokens"]}),
    "a tied base's head": ("tied_model", {"target_modules": ["lm_head"]}),
    "a tied base's head, saved": ("tied_model", {"modules_to_save": ["lm_head"]}),
    "tokens of a tied base": ("tied_model", {"trainable_token_indices": [7, 3]}),
}


@pytest.mark.parametrize(("model", "options"), FINE_TUNED.values(), ids=FINE_TUNED.keys())
def test_rows_in_which_the_training_base_differed_come_with_the_adapter(
    model: str,
    options: dict[str, Any],
    make_peft: Callable[..., PeftModel],
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    base = request.getfixturevalue(model)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.embed_tokens.weight[[3, 5, 39]] += 1
        other.lm_head.weight[[0, 5]] -= 1
    peft = make_peft(LoraConfig(**{**LORA, **options}), other)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "adapter"), layout_of(base))
    assert "TokenRows" in adapter.kinds
    check_all(adapter, tmp_path / "adapter", base, layout_of(base))


def check_all(
    adapter: Adapter, folder: Path, base: LlamaForCausalLM, layout: BaseLayout
) -> set[str]:
    """Holds every module of the base with the deltas in it against that of PEFT, which loads the
    adapter over the same base; which ones changed."""
    own = PeftModel.from_pretrained(copy.deepcopy(base), folder).get_base_model()
    changed = set()
    for module in (*layout.target_shapes, *layout.norm_sizes):
        if module == EMBEDDING:
            x = torch.arange(layout.vocab_size)
        else:
            x = torch.randn(5, base.get_submodule(module).weight.shape[-1])
        with torch.no_grad():
            want, before = own.get_submodule(module)(x), base.get_submodule(module)(x)
        got = compute(adapter.modules.get(module, ()), module, x, base, layout)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, msg=module)
        if (want - before).abs().max() > 1e-3:
            changed.add(module)
    return changed


def compute(
    deltas: tuple[Any, ...], module: str, x: Tensor, base: LlamaForCausalLM, layout: BaseLayout
) -> Tensor:
    if module in layout.norm_sizes:
        norm = copy.deepcopy(base.get_submodule(module))
        for delta in deltas:
            assert isinstance(delta, NormWeight)
            norm.weight.data = delta.weight
        return norm(x).detach()
    weight = layout.weight(module).clone()
    for rows in deltas:
        if isinstance(rows, TokenRows):
            weight[rows.ids] = rows.rows
    others = [delta for delta in deltas if not isinstance(delta, TokenRows)]
    if module == EMBEDDING:
        return merge_into(weight.T, None, others)[0].T[x]
    return torch.nn.functional.linear(x, *merge_into(weight, layout.bias(module), others))


def test_the_tokens_rows_go_before_a_saved_embeddings(
    make_peft: Callable[..., PeftModel],
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
    tmp_path: Path,
) -> None:
    other = copy.deepcopy(base_model)
    with torch.no_grad():
        other.model.embed_tokens.weight[[1, 3]] += 1
    peft = make_peft(tokens(7, 3), other)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "adapter"), layout_of(base_model))
    (rows,) = adapter.modules[EMBEDDING]
    assert isinstance(rows, TokenRows)
    assert rows.ids.tolist() == [1, 3, 7]
    check_all(adapter, tmp_path / "adapter", base_model, layout_of(base_model))


CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "a weight of an adapted layer": (
        {},
        {f"{PREFIX}{Q1}.weight": torch.ones(36, 36)},
        "both replaces the weight of '.*q_proj' and changes the module",
    ),
    "a saved norm beside activated LoRA": (
        {"alora_invocation_tokens": [3]},
        {f"{PREFIX}model.norm.weight": torch.ones(36)},
        "replaces 'model.norm' for all tokens, while activated LoRA acts on some",
    ),
    "trained tokens beside activated LoRA": (
        {"alora_invocation_tokens": [3], "trainable_token_indices": [4]},
        {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 36)},
        "replaces 'model.embed_tokens' for all tokens",
    ),
    "DoRA over another weight": (
        {"use_dora": True},
        {
            f"{PREFIX}{Q1}.lora_magnitude_vector": torch.ones(36),
            f"{PREFIX}{Q1}.base_layer.weight": torch.ones(36, 36),
        },
        "replaces the weight of '.*q_proj', and its change of the same module has to be computed",
    ),
}


@pytest.mark.parametrize(("config", "tensors", "message"), CONFLICTS.values(), ids=CONFLICTS.keys())
def test_what_does_not_add_up_is_refused_by_name(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    message: str,
    make_lora_tensors: Callable[..., dict[str, Tensor]],
    adapter_files: Any,
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
) -> None:
    folder = adapter_files.write("conflict", make_lora_tensors() | tensors, **config)
    with pytest.raises(InvalidAdapterError, match=message):
        read_adapter(AdapterRef("conflict", 1, folder), layout_of(base_model))


def test_activated_lora_may_come_with_the_bases_own_head(
    make_peft: Callable[..., PeftModel],
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
    tmp_path: Path,
) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], alora_invocation_tokens=[3])
    make_peft(config, base_model)
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "adapter"), layout_of(base_model))
    assert adapter.kinds == ("Invocation", "LowRank")


@pytest.mark.parametrize(
    "tensors",
    [{}, {f"{PREFIX}{Q1}.lora_velora_embed": torch.ones(3)}],
    ids=["no tensors", "tensors that only training needs"],
)
def test_an_adapter_that_changes_nothing_is_refused(
    tensors: dict[str, Tensor], adapter_files: Any
) -> None:
    with pytest.raises(InvalidAdapterError, match="changes no module, so it would give the base"):
        adapter_files.read(adapter_files.write("nothing", tensors))


def test_the_bases_own_embedding_alone_changes_nothing(
    adapter_files: Any,
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
) -> None:
    weight = base_model.model.embed_tokens.weight.detach().clone()
    folder = adapter_files.write("same", {f"{PREFIX}{EMBEDDING}.weight": weight})
    with pytest.raises(InvalidAdapterError, match="changes no module"):
        read_adapter(AdapterRef("same", 1, folder), layout_of(base_model))


def test_saved_modules_alone_are_an_adapter_whose_config_is_checked_all_the_same(
    adapter_files: Any,
) -> None:
    tensors = {f"{PREFIX}model.norm.weight": torch.full((36,), 2.0)}
    adapter = adapter_files.read(adapter_files.write("norm", tensors))
    assert {module: d.kind for module, (d,) in adapter.modules.items()} == {
        "model.norm": "NormWeight"
    }
    with pytest.raises(InvalidAdapterError, match="layer_replication is"):
        adapter_files.read(adapter_files.write("deep", tensors, layer_replication=[[0, 4]]))


def test_an_outline_has_all_that_a_module_may_get() -> None:
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "trainable_token_indices": {"embed_tokens": [3]},
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"{PREFIX}{HEAD}.lora_A.weight": (2, 36),
        f"{PREFIX}{HEAD}.lora_B.weight": (40, 2),
        f"{PREFIX}{HEAD}.base_layer.weight": (40, 36),
        f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta": (1, 36),
        f"{PREFIX}{Q1}.bias": (36,),
    }
    assert outline_adapter(config, shapes) == (
        "LORA",
        {
            HEAD: ModuleOutline("LowRank", 2, ("TokenRows",)),
            EMBEDDING: ModuleOutline("TokenRows", 0),
            Q1: ModuleOutline("Bias", 0),
        },
    )
