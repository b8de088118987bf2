"""Merged models as folders: transformers and our own decoder read them alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from polydelta.adapters_store.base_layout import EMBEDDING, FINAL_NORM, HEAD
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    Dense,
    LowRank,
    NormWeight,
    TokenRows,
)
from polydelta.adapters_store.errors import StoreError
from polydelta.adapters_store.merged_model import MergedModel
from polydelta.engine.models.base_weights import checkpoint_layout
from polydelta.engine.models.checkpoint import Checkpoint, open_checkpoint
from polydelta.engine.models.config import ModelConfig, RopeConfig, from_hf
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.hf_config import from_gguf
from polydelta.engine.models.hf_folder import HfFolder
from polydelta.engine.models.hf_writer import write_model
from polydelta.engine.request import GenerationRequest, SamplingParams

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
TOKENS = torch.tensor([[1, 7, 30, 2, 4000, 0, 49151]])
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=False),
    "qwen3": Qwen3Config(**SIZES),
}

SaveModel = Callable[..., tuple[PreTrainedModel, Checkpoint]]


@dataclass(frozen=True)
class FromGguf:
    """Stands for a GGUF file: the tensors, and no config.json."""

    folder: HfFolder

    def names(self) -> Collection[str]:
        return self.folder.names()

    def read(self, name: str) -> Tensor:
        return self.folder.read(name)


@pytest.fixture
def save_model(tmp_path: Path, default_checkpoint: Checkpoint) -> SaveModel:
    def save(
        config: PreTrainedConfig, from_gguf: bool = False
    ) -> tuple[PreTrainedModel, Checkpoint]:
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
        model.save_pretrained(tmp_path / "base")
        default_checkpoint.tokenizer.save(tmp_path / "base")
        folder = HfFolder(tmp_path / "base")
        tensors = FromGguf(folder) if from_gguf else folder
        return model, Checkpoint("base", folder.config, tensors, default_checkpoint.tokenizer)

    return save


def write(
    folder: Path,
    checkpoint: Checkpoint,
    modules: Mapping[str, Sequence[Delta]],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    deltas = {name: tuple(deltas) for name, deltas in modules.items()}
    layout = checkpoint_layout(checkpoint, dtype)
    adapter = Adapter("a", 1, "", "TEST", deltas)
    write_model(folder, MergedModel(adapter, layout), checkpoint, dtype, **options)


def logits(folder: Path) -> Tensor:
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize(
    ("family", "from_gguf"),
    # GGUF files tell of no sliding windows.
    [
        (family, gguf)
        for family in FAMILIES
        for gguf in (False, True)
        if (family, gguf) != ("mistral", True)
    ],
)
def test_transformers_computes_with_the_folder_what_the_adapter_does(
    family: str, from_gguf: bool, save_model: SaveModel, tmp_path: Path
) -> None:
    model, checkpoint = save_model(FAMILIES[family], from_gguf)
    dense, low_rank = (
        Dense(torch.randn(36, 36) * 0.2),
        LowRank(torch.randn(2, 36), torch.ones(52, 2)),
    )
    norm, rows = torch.randn(36), TokenRows(torch.tensor([7, 49151]), torch.randn(2, 36))
    modules = {Q: [dense], UP: [low_rank], FINAL_NORM: [NormWeight(norm)], EMBEDDING: [rows]}
    write(tmp_path / "out", checkpoint, modules)
    with torch.no_grad():
        if checkpoint.config.tie_embeddings:
            # Only the embedding was changed, and not the head.
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.get_submodule(Q).weight += dense.weight
        model.get_submodule(UP).weight += low_rank.dense()
        model.model.norm.weight.copy_(norm)
        model.model.embed_tokens.weight[rows.ids] = rows.rows
        want = model(TOKENS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("from_gguf", [False, True])
def test_the_server_answers_with_the_folder_as_transformers_does(
    from_gguf: bool, save_model: SaveModel, tmp_path: Path, serve: Callable, run: Callable
) -> None:
    _, base = save_model(FAMILIES["llama-tied"], from_gguf)
    change = LowRank(torch.randn(2, 36), torch.randn(36, 2))
    write(tmp_path / "out", base, {Q: [change]})
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    assert checkpoint.config == base.config
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    prompt = TOKENS[0].tolist()
    with serve(checkpoint) as engine:
        answer = run(engine, [GenerationRequest("one", prompt, params)])["one"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    want = model.generate(TOKENS, max_new_tokens=20, do_sample=False, eos_token_id=-1)
    assert answer.token_ids == want[0, len(prompt) :].tolist()


def test_the_tokenizer_and_its_chat_template_come_along(
    save_model: SaveModel, default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    _, checkpoint = save_model(FAMILIES["llama"], from_gguf=True)
    write(tmp_path / "out", checkpoint, {Q: [Dense(torch.zeros(36, 36))]})
    text = "In 1984: <|im_start|>naïve café, 12345 x\n\n\tif (a != b) { 日本語 }"
    conversation = [{"role": "user", "content": text}]
    ours = default_checkpoint.tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    reopened = open_checkpoint(str(tmp_path / "out")).tokenizer
    assert theirs(text)["input_ids"] == ours.encode(text) == reopened.encode(text)
    chat = theirs.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    assert chat == ours.chat(conversation) == reopened.chat(conversation)
    assert reopened.eos_token_ids == ours.eos_token_ids


def test_generation_defaults_of_the_base_come_along(save_model: SaveModel, tmp_path: Path) -> None:
    _, checkpoint = save_model(FAMILIES["llama"])
    defaults = {"eos_token_id": [2, 49151], "temperature": 0.6}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(defaults))
    write(tmp_path / "out", checkpoint, {Q: [Dense(torch.zeros(36, 36))]})
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == defaults
    assert open_checkpoint(str(tmp_path / "out")).tokenizer.eos_token_ids == (2, 49151)


def test_weights_are_written_in_the_dtype_that_is_asked_for(
    save_model: SaveModel, tmp_path: Path
) -> None:
    model, checkpoint = save_model(FAMILIES["llama"])
    change = torch.randn(36, 36)
    write(tmp_path / "out", checkpoint, {Q: [Dense(change)]}, torch.bfloat16)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    rounded = model.get_submodule(Q).weight.bfloat16().float()
    assert torch.equal(written[f"{Q}.weight"], (rounded + change).bfloat16())


@pytest.mark.parametrize("shard_bytes", [1, 3_000_000])
def test_a_large_model_lies_in_several_files(
    shard_bytes: int, save_model: SaveModel, tmp_path: Path
) -> None:
    _, checkpoint = save_model(FAMILIES["llama"])
    modules = {Q: [Dense(torch.randn(36, 36))]}
    write(tmp_path / "one", checkpoint, modules)
    write(tmp_path / "out", checkpoint, modules, shard_bytes=shard_bytes)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0].endswith(f"-of-{len(files):05}.safetensors")
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "out"))
    assert HfFolder(tmp_path / "out").names() == HfFolder(tmp_path / "one").names()


def test_one_new_bias_gives_its_neighbours_biases_of_zero(
    save_model: SaveModel, tmp_path: Path
) -> None:
    model, checkpoint = save_model(FAMILIES["llama"])
    vector = torch.randn(36)
    write(tmp_path / "out", checkpoint, {Q: [Bias(vector)]})
    model.get_submodule(Q).bias = torch.nn.Parameter(vector)
    with torch.no_grad():
        want = model(TOKENS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), want, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, False)


@pytest.mark.parametrize(
    ("family", "module", "size"),
    [("mistral", Q, 36), ("qwen2", UP, 52), ("qwen3", UP, 52), ("llama", HEAD, 49152)],
)
def test_a_bias_that_the_family_has_no_place_for_is_refused_by_name(
    family: str, module: str, size: int, save_model: SaveModel, tmp_path: Path
) -> None:
    _, checkpoint = save_model(FAMILIES[family])
    part = module.split(".", 3)[-1]
    with pytest.raises(ModelError, match=rf"gives {part} a bias, .* {family} model"):
        write(tmp_path / "out", checkpoint, {module: [Bias(torch.randn(size))]})
    assert not (tmp_path / "out").exists()


def test_numbers_that_do_not_fit_the_dtype_leave_nothing_behind(
    save_model: SaveModel, tmp_path: Path
) -> None:
    _, checkpoint = save_model(FAMILIES["llama"])
    change = Dense(torch.full((36, 36), 1e6))
    with pytest.raises(ModelError, match=r"torch\.float16 does not hold: take bfloat16"):
        write(tmp_path / "out", checkpoint, {Q: [change]}, torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_nothing_is_written_over(save_model: SaveModel, tmp_path: Path) -> None:
    _, checkpoint = save_model(FAMILIES["llama"])
    with pytest.raises(StoreError, match="is not empty"):
        write(tmp_path / "base", checkpoint, {Q: [Dense(torch.zeros(36, 36))]})


@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_gguf_files_shape_survives_config_json(family: str, kind: str, tmp_path: Path) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    rope = RopeConfig(12345.0, kind, {} if kind == "default" else scaling)
    base = from_hf(FAMILIES[family].to_dict())
    config = replace(base, rope=rope, tie_embeddings=False, sliding_windows=(None,) * 2)
    raw = from_gguf(config) | {"eos_token_id": 2, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    got: ModelConfig = HfFolder(tmp_path).config
    assert replace(got, rope=rope) == config
    assert (got.rope.type, got.rope.theta) == (kind, 12345.0)
    assert kind == "default" or got.rope.scaling.items() >= scaling.items()


def test_divided_frequencies_of_a_gguf_file_have_no_config_json() -> None:
    base = from_hf(FAMILIES["llama"].to_dict())
    config = replace(base, rope=RopeConfig(1e4, "divided", {"divisors": [1.0]}))
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        from_gguf(config)
