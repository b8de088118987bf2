"""Sums of adapters of every kind that adds up, against the base whose weights were merged with the
same sum, float32; and the kinds that do not add up, refused by their names."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.composition import Share, check_addable, combine
from polydelta.adapters_store.delta_kinds import ADDABLE, KINDS, NOT_SERVED
from polydelta.adapters_store.errors import CompositionError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.inspection import inspect
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.hf_folder import HfFolder
from polydelta.engine.request import GenerationRequest, SamplingParams

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "k_proj", "up_proj", "down_proj"]
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
STD = 0.1

ADDABLE_IN_PEFT: Mapping[str, Callable[[], PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=5, lora_alpha=9, target_modules=LINEARS, **TASK),
    # Embedding, head and a whole layer besides, and all biases of the base.
    "lora-all": lambda: peft.LoraConfig(
        r=3,
        target_modules=[*SOME, "embed_tokens", "lm_head"],
        modules_to_save=["o_proj"],
        bias="all",
        **TASK,
    ),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=LINEARS, **TASK),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=SOME, **TASK),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=LINEARS, **TASK),
    "beft": lambda: peft.BeftConfig(target_modules=["v_proj", "o_proj"], **TASK),
}
BY_HAND = ("s2ft", "bitdelta")
PARTS = (*ADDABLE_IN_PEFT, *BY_HAND)

# Each of them has a kind whose sum is not defined.
NOT_ADDABLE: Mapping[str, tuple[str, Callable[[], PeftConfig]]] = {
    "dora": (
        "Scale",
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=SOME, **TASK),
    ),
    "ia3": (
        "Scale",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
        ),
    ),
    "road": ("Rotate", lambda: peft.RoadConfig(group_size=4, target_modules=["q_proj"], **TASK)),
    "norms": ("NormWeight", lambda: peft.LNTuningConfig(target_modules=["norm"], **TASK)),
    "saved-norm": (
        "NormWeight",
        lambda: peft.LoraConfig(r=2, target_modules=SOME, modules_to_save=["norm"], **TASK),
    ),
    "tokens": ("TokenRows", lambda: peft.TrainableTokensConfig(token_indices=[3, 7], **TASK)),
    "lora-tokens": (
        "TokenRows",
        lambda: peft.LoraConfig(
            r=2, target_modules=SOME, trainable_token_indices=[3, 7, 40], **TASK
        ),
    ),
    "prefix": ("Prefix", lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, **TASK)),
    "prompt": ("Prompt", lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **TASK)),
    "alora": (
        "Invocation",
        lambda: peft.LoraConfig(
            r=2, alora_invocation_tokens=[19842, 42], target_modules=SOME, **TASK
        ),
    ),
}

SUMS: Mapping[str, Mapping[str, float]] = {
    **{f"half-{name}": {name: 0.5} for name in PARTS},
    "shira-s2ft": {"shira": -0.7, "s2ft": 1.3},
    "bitdelta-lokr": {"bitdelta": 0.6, "lokr": -1.0},
    "c3a-beft": {"c3a": 1.5, "beft": -2.0},
    "all": {name: (-1) ** place * (0.3 + place / 9) for place, name in enumerate(PARTS)},
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """With a bias in each linear layer, and a head of its own."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=60,
        intermediate_size=92,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


# Parameter of the base -> what an adapter adds to it.
Change = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def changes(model: LlamaForCausalLM, root: Path) -> dict[str, Change]:
    """Of every part, whose files are in `root` then."""
    made: dict[str, Change] = {}
    for seed, name in enumerate(PARTS):
        torch.manual_seed(seed)
        if name in ADDABLE_IN_PEFT:
            of_peft(model, ADDABLE_IN_PEFT[name](), root / name)
            own: Any = PeftModel.from_pretrained(copy.deepcopy(model), root / name)
            merged = dict(own.merge_and_unload().named_parameters())
        else:
            merged = {"s2ft": s2ft, "bitdelta": bitdelta}[name](model, root / name)
        made[name] = {
            key: difference
            for key, value in merged.items()
            if (difference := value.detach() - model.get_parameter(key).detach()).any()
        }
    return made


def of_peft(model: LlamaForCausalLM, config: PeftConfig, folder: Path) -> None:
    """All that PEFT trains of it random."""
    made = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * STD)
    # Or it adds the base's own embedding where that is adapted.
    made.save_pretrained(folder, save_embedding_layers=False)


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{key}": t.contiguous() for key, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def s2ft(model: LlamaForCausalLM, folder: Path) -> Change:
    """The weights, of which some rows of v and up, and some columns of o and down, are changed."""
    tensors, weights = {}, {}
    for name, module in model.named_modules():
        if not name.endswith(("v_proj", "up_proj", "o_proj", "down_proj")):
            continue
        dim, part = (0, "rows") if name.endswith(("v_proj", "up_proj")) else (1, "columns")
        weight = module.weight.detach()
        indices = torch.randperm(weight.shape[dim])[:7].sort().values
        change = torch.randn_like(weight.index_select(dim, indices)) * STD
        tensors[f"{name}.s2ft_indices"] = indices.int()
        tensors[f"{name}.s2ft_{part}"] = change
        weights[f"{name}.weight"] = weight.index_add(dim, indices, change)
    write(folder, {"peft_type": "S2FT"}, tensors)
    return weights


def bitdelta(model: LlamaForCausalLM, folder: Path) -> Change:
    """The weights `W + scale * sign`."""
    tensors, weights, places = {}, {}, 2 ** torch.arange(8)
    for name, module in model.named_modules():
        if not name.endswith(tuple(LINEARS)):
            continue
        weight, scale = module.weight.detach(), 0.01 + 0.03 * torch.rand(1)
        ones = torch.rand_like(weight) < 0.5
        padded = torch.nn.functional.pad(ones, (0, -ones.shape[1] % 8)).unflatten(1, (-1, 8))
        tensors[f"{name}.bitdelta_bits"] = (padded * places).sum(-1).to(torch.uint8)
        tensors[f"{name}.bitdelta_scale"] = scale
        weights[f"{name}.weight"] = weight + torch.where(ones, scale, -scale)
    write(folder, {"peft_type": "BITDELTA"}, tensors)
    return weights


def flylora(model: LlamaForCausalLM, folder: Path) -> None:
    name, size = "model.layers.1.self_attn.q_proj", model.config.hidden_size
    tensors = {
        f"{name}.A": torch.randn(8, size),
        f"{name}.B": torch.randn(size, 8),
        f"{name}.d": torch.randn(8),
    }
    write(folder, {"peft_type": "FLYLORA", "r": 8, "k": 3, "alpha": 16}, tensors)


def merged(
    base: LlamaForCausalLM, changes: Mapping[str, Change], weights: Mapping[str, float]
) -> LlamaForCausalLM:
    total = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in weights.items():
            for key, change in changes[name].items():
                total.get_parameter(key).add_(change, alpha=weight)
    return total


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_kinds_equals_merging_the_weighted_sum(
    name: str, model: LlamaForCausalLM, changes: dict[str, Change], root: Path, paged: Callable
) -> None:
    """In one batch with base rows, with one of its parts alone, and with the sum turned round."""
    weights, decoder = SUMS[name], paged(model)
    loaded = {
        part: decoder.load(root / part, scattered=bool(place % 2))
        for place, part in enumerate(weights)
    }
    first = next(iter(weights))
    shares = [(loaded[part], weight) for part, weight in weights.items()]
    rows = [(0, None), (1, shares), (2, loaded[first]), (3, shares[::-1])]
    tokens = torch.randint(3, 40000, (19,), generator=torch.Generator().manual_seed(4)).tolist()
    steps = [
        decoder.feed(*((row, tokens[part], adapter) for row, adapter in rows))
        for part in (slice(0, 13), slice(13, 18), slice(18, 19))
    ]
    got = [torch.cat([step[row] for step in steps]) for row, _ in rows]
    wanted: tuple[Mapping[str, float], ...] = ({}, weights, {first: 1.0}, weights)
    for logits, sum_of in zip(got, wanted, strict=True):
        with torch.inference_mode():
            want = merged(model, changes, sum_of)(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits, want, atol=1e-3, rtol=0)
    assert (got[1] - got[0]).abs().max() > 0.1, "the sum does nothing"


def test_sums_batched_by_the_engine_answer_as_the_merged_models(
    model: LlamaForCausalLM,
    changes: dict[str, Change],
    root: Path,
    default_checkpoint: Checkpoint,
    serve: Callable,
    run: Callable,
    tmp_path: Path,
) -> None:
    """Greedy; the same prompt for all, which none may find computed by another."""
    model.save_pretrained(tmp_path)
    folder, catalog = HfFolder(tmp_path), FolderCatalog([root])
    checkpoint = Checkpoint("biased", folder.config, folder, default_checkpoint.tokenizer)
    prompt = torch.randint(3, 40000, (37,), generator=torch.Generator().manual_seed(5)).tolist()
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    sums: dict[str, Mapping[str, float]] = {"base": {}, **SUMS}
    requests = [
        GenerationRequest(
            name,
            prompt,
            params,
            combine(Share(catalog.resolve(part), weight) for part, weight in weights.items()),
        )
        for name, weights in sums.items()
    ]
    with serve(checkpoint) as engine:
        answers = {name: answer.token_ids for name, answer in run(engine, requests).items()}
    for name, weights in sums.items():
        out = merged(model, changes, weights).generate(
            torch.tensor([prompt]), max_new_tokens=9, min_new_tokens=9, do_sample=False
        )
        assert answers[name] == out[0, len(prompt) :].tolist(), name
    assert len({tuple(tokens) for tokens in answers.values()}) > len(sums) // 2


def kinds_of(folder: Path, layout: BaseLayout) -> tuple[str, ...]:
    """What a sum is judged by, known without the base; over this base nothing comes that does not
    add up."""
    kinds = inspect(folder).kinds
    ref = FolderCatalog([folder.parent]).resolve(folder.name)
    assert set(read_adapter(ref, layout).kinds) - ADDABLE == set(kinds) - ADDABLE
    return kinds


def test_all_kinds_that_add_up_and_are_served_are_summed_here(
    model: LlamaForCausalLM, changes: dict[str, Change], root: Path, paged: Callable
) -> None:
    layout, found = paged(model).layout, set()
    for name in changes:
        kinds = kinds_of(root / name, layout)
        check_addable(name, kinds)
        found |= set(kinds)
    assert found == ADDABLE - NOT_SERVED


@pytest.mark.parametrize("name", [*NOT_ADDABLE, "flylora"])
def test_a_kind_whose_sum_is_not_defined_is_refused_by_its_name(
    name: str, model: LlamaForCausalLM, paged: Callable, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    if name == "flylora":
        kind = "TopK"
        flylora(model, tmp_path / name)
    else:
        kind, config = NOT_ADDABLE[name]
        of_peft(model, config(), tmp_path / name)
    kinds = kinds_of(tmp_path / name, paged(model).layout)
    with pytest.raises(
        CompositionError, match=rf"'{name}@1' has deltas of kind {kind}, which can be neither"
    ):
        check_addable(f"{name}@1", kinds)


def test_each_kind_either_adds_up_or_is_refused_here() -> None:
    assert set(KINDS) - ADDABLE == {"TopK", *(kind for kind, _ in NOT_ADDABLE.values())}
