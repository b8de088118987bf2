"""Adapters of many kinds over the default model, and one server for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import peft
import pytest
import torch
from peft import PeftConfig, get_peft_model
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.engine.models.checkpoint import Checkpoint

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
# Nine tokens, fewer than a page has, so that the prefix cache has nothing of it.
PROMPT = "In the morning the river had taken the old"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# " Answer briefly:"
INVOCATION = [19842, 13099, 42]
# The largest rank that the server takes.
MAX_RANK = 64

PEFT_KINDS: Mapping[str, Callable[[], PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=LINEARS, **TASK),
    "dora": lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=SOME, **TASK),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=SOME, **TASK),
    "loha": lambda: peft.LoHaConfig(r=3, target_modules=SOME, **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=21, **TASK),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=9, **TASK),
    # " the" and " old".
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[260, 1573], **TASK),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **TASK),
    "alora": lambda: peft.LoraConfig(
        r=4, alora_invocation_tokens=INVOCATION, target_modules=LINEARS, **TASK
    ),
}
# How much of it, so that the answers are others than the base's.
NOISE = {"loha": 0.3, "shira": 0.3, "tokens": 0.3}


class Maker:
    """Adapter folders over the default model's own weights, with random numbers in them."""

    def __init__(self, checkpoint: Checkpoint, root: Path) -> None:
        self._root = root
        source, shape = checkpoint.tensors, checkpoint.config
        # In an order of their own: that of a set changes from process to process, and what is drawn
        # for a module with it. Of BitDeltas drawn by chance some answer as the base does.
        self._weights = {name: source.read(name).float() for name in sorted(source.names())}
        self._config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            tie_word_embeddings=True,
        )

    def of_peft(self, name: str, config: PeftConfig) -> Path:
        with torch.device("meta"):
            base = LlamaForCausalLM(self._config)
        base.load_state_dict(self._weights, strict=False, assign=True)
        base.tie_weights()
        base.requires_grad_(False)
        torch.manual_seed(len(name))
        made = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * NOISE.get(name, 0.05))
        made.save_pretrained(self._root / name)
        return self._root / name

    def changed(self, source: Path, name: str, **config: Any) -> Path:
        """The files of another adapter, with other settings."""
        settings = json.loads((source / "adapter_config.json").read_text())
        tensors = load_file(source / "adapter_model.safetensors")
        return self.write(name, settings | config, tensors)

    def write(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        folder = self._root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        return folder

    def s2ft(self) -> Path:
        torch.manual_seed(1)
        tensors: dict[str, Tensor] = {}
        for module, (rows, columns) in self._linears("up_proj", "down_proj"):
            part, size = ("rows", rows) if module.endswith("up_proj") else ("columns", columns)
            tensors[f"{module}.s2ft_indices"] = torch.randperm(size)[:5].sort().values.int()
            block = torch.randn((5, columns) if part == "rows" else (rows, 5))
            tensors[f"{module}.s2ft_{part}"] = block
        return self.write("s2ft", {"peft_type": "S2FT"}, tensors)

    def bitdelta(self) -> Path:
        torch.manual_seed(2)
        tensors: dict[str, Tensor] = {}
        for module, (rows, columns) in self._linears(*SOME):
            bits = torch.randint(256, (rows, columns // 8), dtype=torch.uint8)
            tensors[f"{module}.bitdelta_bits"] = bits
            tensors[f"{module}.bitdelta_scale"] = torch.tensor([0.02])
        return self.write("bitdelta", {"peft_type": "BITDELTA"}, tensors)

    def _linears(self, *targets: str) -> Iterator[tuple[str, tuple[int, int]]]:
        for name, weight in self._weights.items():
            module = name.removesuffix(".weight")
            if module.endswith(targets):
                yield f"base_model.model.{module}", (weight.shape[0], weight.shape[1])


@dataclass(frozen=True)
class Api:
    """What the tests ask of a server."""

    url: str
    client: openai.OpenAI
    base: str

    @classmethod
    def of(cls, url: str) -> Api:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        return cls(url, client, next(iter(client.models.list())).id)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=60, **options)

    def upload(self, adapter_id: str, folder: Path) -> httpx.Response:
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = [("files", (name, (folder / name).read_bytes())) for name in names]
        return self.call("POST", "/v1/adapters", data={"id": adapter_id}, files=files)

    def complete(self, model: str, adapters: Any = None, **options: Any) -> Any:
        """Greedy."""
        extra = {"ignore_eos": True, "adapters": adapters}
        options = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0} | options
        return self.client.completions.create(model=model, extra_body=extra, **options)

    def text(self, model: str, **options: Any) -> str:
        text: str = self.complete(model, **options).choices[0].text
        return text

    def chat(self, model: str) -> Any:
        return self.client.chat.completions.create(
            model=model, messages=QUESTION, max_tokens=6, temperature=0
        )

    def pages(self) -> dict[str, float]:
        """Of the pool, by who holds them."""
        families = text_string_to_metric_families(self.call("GET", "/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {s.labels["owner"]: s.value for s in samples if s.name == "polydelta_pool_pages"}


@pytest.fixture(scope="session")
def start_bare(
    launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Api]:
    """A server without adapters, with more options."""

    def start(*options: str) -> Api:
        return Api.of(launch("--adapters", str(tmp_path_factory.mktemp("none")), *options).url)

    return start


@pytest.fixture(scope="session")
def starting(start_bare: Callable[..., Api]) -> Iterator[Future[Api]]:
    """The server, which starts while the adapters are made. Its pool holds all of these."""
    with ThreadPoolExecutor(1) as starter:
        yield starter.submit(start_bare, "--pool", "120MiB", "--max-adapter-rank", str(MAX_RANK))


@pytest.fixture(scope="session")
def maker(default_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(default_checkpoint, tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="session")
def folders(starting: Future[Api], maker: Maker) -> dict[str, Path]:
    """An adapter of each kind."""
    made = {name: maker.of_peft(name, config()) for name, config in PEFT_KINDS.items()}
    return made | {"s2ft": maker.s2ft(), "bitdelta": maker.bitdelta()}


@pytest.fixture(scope="session")
def api(starting: Future[Api], folders: dict[str, Path]) -> Api:
    return starting.result()


@pytest.fixture(scope="session")
def uploaded(api: Api, folders: dict[str, Path]) -> dict[str, httpx.Response]:
    """The answers to the uploads of all, at once."""
    with ThreadPoolExecutor(len(folders)) as clients:
        answers = list(clients.map(api.upload, folders, folders.values()))
    return dict(zip(folders, answers, strict=True))
