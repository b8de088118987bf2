"""One step with many kinds of adapter at once, each against its author's own forward, float32."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.delta_kinds import KINDS, NOT_SERVED
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.models.checkpoint import Checkpoint, default_model, open_checkpoint
from polydelta.engine.request import GenerationRequest, SamplingParams

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = (
    "A storm came down from the mountains in the night, and in the morning the river had taken the "
    "old bridge. People stood on both banks and shouted news across the water, until somebody "
    "found a boat and a long rope, and the baker sent his bread over before it was cold."
)
# " Answer briefly:", which calls the activated LoRA, and where it stands in a prompt.
INVOCATION, ACTIVATION = [19842, 13099, 42], 6
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}

PEFT_KINDS: Mapping[str, Callable[[], PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=5, target_modules=LINEARS, **TASK),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=LINEARS, **TASK),
    "vera": lambda: peft.VeraConfig(r=11, target_modules=["q_proj", "o_proj"], **TASK),
    "loha": lambda: peft.LoHaConfig(r=3, target_modules=LINEARS, **TASK),
    "miss": lambda: peft.MissConfig(r=6, target_modules=LINEARS, **TASK),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "road": lambda: peft.RoadConfig(
        variant="road_2", group_size=4, target_modules=["q_proj", "v_proj", "o_proj"], **TASK
    ),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=LINEARS, **TASK),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=LINEARS, **TASK),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=LINEARS, **TASK),
    "beft": lambda: peft.BeftConfig(target_modules=["v_proj", "o_proj"], **TASK),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **TASK),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 7, 40, 41], **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=11, **TASK),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=9, **TASK),
    "alora": lambda: peft.LoraConfig(
        r=6, alora_invocation_tokens=INVOCATION, target_modules=LINEARS, **TASK
    ),
}
# Of what training does to weights, where it is not 0.05: MiSS adds each number to many inputs, and
# what changes logits by tens changes float32's rounding of them by hundredths.
STD = {"lora": 0.02, "miss": 0.01}
NAMES = ("base", *PEFT_KINDS, "s2ft", "bitdelta", "flylora")


@dataclass(frozen=True)
class Kind:
    """An adapter in files, and what its author's model says."""

    folder: Path | None
    # [tokens, vocab]
    logits: Tensor


@pytest.fixture(scope="module")
def default_reference() -> PreTrainedModel:
    path = default_model()
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()


@torch.no_grad()
def make_kind(name: str, base: PreTrainedModel, root: Path) -> Kind:
    """Its weights are all random. Of one model after the other, so that one is kept in memory."""
    torch.manual_seed(NAMES.index(name))
    tokens = torch.tensor([prompts()[name]])
    if name == "base":
        return Kind(None, base(tokens).logits[0])
    if name in PEFT_KINDS:
        return of_peft(name, base, root, tokens)
    make = {"s2ft": s2ft, "bitdelta": bitdelta, "flylora": flylora}[name]
    model = copy.deepcopy(base)
    folder = make(model, root)
    return Kind(folder, model(tokens).logits[0])


def of_peft(name: str, base: PreTrainedModel, root: Path, tokens: Tensor) -> Kind:
    config = PEFT_KINDS[name]()
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * STD.get(name, 0.05))
    model.save_pretrained(root / name)
    restored: Any = PeftModel.from_pretrained(copy.deepcopy(base), root / name).eval()
    out = restored(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
    # Virtual tokens have logits too.
    return Kind(root / name, out[-tokens.shape[1] :])


def write(root: Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{key}": t.contiguous() for key, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def s2ft(model: PreTrainedModel, root: Path) -> Path:
    """Some rows of v and up, some columns of o and down, changed in the model."""
    tensors = {}
    for name, module in model.named_modules():
        if not name.endswith(("v_proj", "up_proj", "o_proj", "down_proj")):
            continue
        by_rows = name.endswith(("v_proj", "up_proj"))
        size = module.weight.shape[0 if by_rows else 1]
        indices = torch.randperm(size)[:7].sort().values
        picked = module.weight[indices] if by_rows else module.weight[:, indices]
        change = 0.1 * torch.randn_like(picked)
        module.weight.index_add_(0 if by_rows else 1, indices, change)
        tensors[f"{name}.s2ft_indices"] = indices.int()
        tensors[f"{name}.{'s2ft_rows' if by_rows else 's2ft_columns'}"] = change
    return write(root, "s2ft", {"peft_type": "S2FT"}, tensors)


def bitdelta(model: PreTrainedModel, root: Path) -> Path:
    """`W + scale * sign` on every linear layer of the model."""
    tensors, places = {}, 2 ** torch.arange(8)
    for name, module in model.named_modules():
        if not name.endswith(tuple(LINEARS)):
            continue
        ones = torch.rand_like(module.weight) < 0.5
        scale = 0.02 * float(module.weight.std())
        padded = torch.nn.functional.pad(ones, (0, -ones.shape[1] % 8)).unflatten(1, (-1, 8))
        tensors[f"{name}.bitdelta_bits"] = (padded * places).sum(-1).to(torch.uint8)
        tensors[f"{name}.bitdelta_scale"] = torch.tensor([scale])
        module.weight.add_(torch.where(ones, scale, -scale))
    return write(root, "bitdelta", {"peft_type": "BITDELTA"}, tensors)


class FlyLinear(torch.nn.Module):
    """FlyLoRA's forward, from its paper."""

    def __init__(self, base: torch.nn.Linear, rank: int, keep: int) -> None:
        super().__init__()
        self.base, self.keep = base, keep
        self.a = torch.randn(rank, base.in_features) * 0.1
        self.b = torch.randn(base.out_features, rank) * 0.1
        self.d = torch.randn(rank) * 0.1

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.a.T
        threshold = (h + self.d).abs().topk(self.keep).values[..., -1:]
        return self.base(x) + 2.0 * (h * ((h + self.d).abs() >= threshold)) @ self.b.T


def flylora(model: PreTrainedModel, root: Path) -> Path:
    tensors = {}
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "down_proj")):
            fly = FlyLinear(module, 8, 3)
            model.set_submodule(name, fly)
            tensors |= {
                f"{name}.A": fly.a,
                f"{name}.B": fly.b,
                f"{name}.d": fly.d,
            }
    config = {"peft_type": "FLYLORA", "r": 8, "k": 3, "alpha": 16}
    return write(root, "flylora", config, tensors)


@cache
def prompts() -> dict[str, list[int]]:
    """Of odd lengths; every one has the invocation, so that no kind is told by its prompt. They are
    text: on random tokens transformers' own float32 differs from float64 by 0.003."""
    text = open_checkpoint(None).tokenizer.encode(TEXT)
    made = {}
    for number, name in enumerate(NAMES):
        tokens = text[2 * number : 2 * number + 15 + number % 5]
        tokens[ACTIVATION : ACTIVATION + len(INVOCATION)] = INVOCATION
        made[name] = tokens
    return made


def check_logits(model: PreTrainedModel, paged: Callable, root: Path, names: tuple) -> None:
    """All in one step: the prompt, one more token, and the last; each against its author."""
    decoder, texts = paged(model), prompts()
    kinds = {name: make_kind(name, model, root) for name in names}
    loaded = {
        name: decoder.load(kind.folder, scattered=bool(number % 2)) if kind.folder else None
        for number, (name, kind) in enumerate(kinds.items())
    }
    starts = {name: ACTIVATION if name == "alora" else 0 for name in names}
    steps = [
        decoder.feed(
            *((number, texts[name][part], loaded[name], starts[name])
              for number, name in enumerate(names))
        )
        for part in (slice(0, -2), slice(-2, -1), slice(-1, None))
    ]  # fmt: skip
    with torch.inference_mode():
        for number, name in enumerate(names):
            tokens = torch.tensor([texts[name]])
            want, bare = kinds[name].logits, model(tokens).logits[0]
            assert name == "base" or (want - bare).abs().max() > 0.05, f"{name} does nothing"
            got = torch.cat([step[number] for step in steps])
            torch.testing.assert_close(got, want, atol=1e-3, rtol=0, msg=lambda m, n=name: n + m)


def test_kinds_mixed_in_one_step_equal_their_authors_forward(
    tiny_model: PreTrainedModel, paged: Callable, tmp_path: Path
) -> None:
    check_logits(tiny_model, paged, tmp_path, NAMES)


@pytest.mark.slow
def test_kinds_mixed_over_the_default_model_equal_their_authors_forward(
    default_reference: PreTrainedModel, paged: Callable, tmp_path: Path
) -> None:
    check_logits(default_reference, paged, tmp_path, NAMES)


@pytest.fixture(scope="module")
def one_of_each(
    tiny_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> list[GenerationRequest]:
    """A request for each kind."""
    root, texts = tmp_path_factory.mktemp("kinds"), prompts()
    for name in NAMES[1:]:
        make_kind(name, tiny_model, root)
    catalog = FolderCatalog([root])
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    return [
        GenerationRequest(
            name,
            texts[name],
            params,
            () if name == "base" else (Share(catalog.resolve(name)),),
        )
        for name in NAMES
    ]


def check_together(
    requests: list[GenerationRequest],
    checkpoint: Checkpoint,
    serve: Callable,
    run: Callable,
    **options: Any,
) -> None:
    """Through the engine: one batch, with and without eviction, equals one request at a time."""
    with serve(checkpoint, **options) as engine:
        alone = {r.request_id: run(engine, [r])[r.request_id].token_ids for r in requests}
        together = {name: a.token_ids for name, a in run(engine, requests).items()}
    assert together == alone
    assert len({tuple(tokens) for tokens in alone.values()}) > len(requests) // 2
    # 3 layers of 2,560-byte pages: room for some of them at a time.
    crowded = {"max_batch_tokens": 24, "max_batch_size": 9, "pool_bytes": 120 * 3 * 2560} | options
    with serve(checkpoint, **crowded) as engine:
        got = {name: a.token_ids for name, a in run(engine, requests).items()}
        assert engine.stats().adapter_evictions > 0, "the pool was not small enough"
    assert got == alone


def test_a_batch_of_all_kinds_answers_each_request_as_alone(
    one_of_each: list[GenerationRequest],
    tiny_checkpoint: Checkpoint,
    serve: Callable,
    run: Callable,
) -> None:
    check_together(one_of_each, tiny_checkpoint, serve, run)


@pytest.mark.parametrize(
    "kv",
    [
        {"kv_format": "int8"},
        {"kv_format": "fp8", "kv_select": "window:3+9"},
        {"kv_format": "int4", "kv_select": "quest:8", "block_size": 4},
        {"kv_format": "kivi-4", "block_size": 5},
        # Virtual tokens have a prompt begin inside of a block.
        {"prefill": "xattention:8+0.5", "max_batch_tokens": 140, "max_batch_size": 9},
    ],
    ids=lambda kv: ", ".join(map(str, kv.values())),
)
def test_a_batch_of_all_kinds_answers_alike_whatever_keeps_and_reads_its_kv(
    kv: dict[str, Any],
    one_of_each: list[GenerationRequest],
    tiny_checkpoint: Checkpoint,
    serve: Callable,
    run: Callable,
) -> None:
    check_together(one_of_each, tiny_checkpoint, serve, run, **kv)


def test_the_kinds_mixed_here_are_all_that_are_served(
    tiny_model: PreTrainedModel, paged: Callable, tmp_path: Path
) -> None:
    from polydelta.adapters_store.formats import read_adapter

    catalog, layout = FolderCatalog([tmp_path]), paged(tiny_model).layout
    found: set[str] = set()
    for name in NAMES[1:]:
        make_kind(name, tiny_model, tmp_path)
        found |= set(read_adapter(catalog.resolve(name), layout).kinds)
    assert found == set(KINDS) - NOT_SERVED
