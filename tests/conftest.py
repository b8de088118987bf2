"""What tests of several folders share: models, adapter files, and a way to run requests."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

# Before anybody imports Triton, as transformers does: where there is no GPU, its interpreter runs
# kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.engine.build import assemble
from polydelta.engine.config import EngineConfig
from polydelta.engine.device import torch_dtype
from polydelta.engine.engine import Engine
from polydelta.engine.models.base_weights import checkpoint_layout
from polydelta.engine.models.checkpoint import Checkpoint, open_checkpoint
from polydelta.engine.models.hf_folder import HfFolder
from polydelta.engine.models.tokenizer import Tokenizer
from polydelta.engine.request import FinishReason, GenerationRequest, RequestOutput
from polydelta.kernels.ops import kernels_for


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those that start servers come one after the other: two servers
    on two cores would starve each other, and some tests wait for them by the clock."""
    for item in items:
        if "e2e" in item.path.parts or item.path.name == "test_serving.py":
            item.add_marker(pytest.mark.xdist_group("servers"))


@pytest.fixture(scope="session", autouse=True)
def nobodys_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever a test does not say, it never touches the store of the user who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYDELTA_STORE", str(tmp_path_factory.mktemp("store")))
        yield


@dataclass
class Answer:
    """Everything that one request was given."""

    outputs: list[RequestOutput] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason

    @property
    def error(self) -> str | None:
        return self.outputs[-1].error


def run_requests(
    engine: Engine, requests: Iterable[GenerationRequest], timeout: float = 300.0
) -> dict[str, Answer]:
    """Submits all at once and waits for the last of them. Request id -> answer."""
    answers: dict[str, Answer] = {}
    done: list[threading.Event] = []
    for request in requests:
        answer, ended = Answer(), threading.Event()

        def take(
            output: RequestOutput, answer: Answer = answer, ended: threading.Event = ended
        ) -> None:
            answer.outputs.append(output)
            if output.finished:
                ended.set()

        answers[request.request_id] = answer
        done.append(ended)
        engine.submit(request, take)
    for ended in done:
        assert ended.wait(timeout), "a request did not finish in time"
    return answers


@contextmanager
def running_engine(
    checkpoint: Checkpoint, ends_alive: bool = True, **options: Any
) -> Iterator[Engine]:
    """A started float32 engine that balances its books whenever it goes idle."""
    options = {"dtype": "float32", "pool_bytes": 64 << 20, "check_integrity": True} | options
    config = EngineConfig(**options)
    kernels = kernels_for(torch.device("cpu"), torch_dtype(config.dtype))
    engine = assemble(checkpoint, config, kernels)
    engine.start()
    try:
        yield engine
    finally:
        assert engine.alive == ends_alive, "the engine's loop died during the test"
        engine.shutdown()


@pytest.fixture(scope="session")
def run() -> Callable[..., dict[str, Answer]]:
    return run_requests


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    return running_engine


@pytest.fixture(scope="session")
def default_checkpoint() -> Checkpoint:
    return open_checkpoint(None)


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """A random Llama of odd sizes, with the default model's vocabulary."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=60,
        intermediate_size=92,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_model: LlamaForCausalLM,
    default_checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model.save_pretrained(folder)
    model = HfFolder(folder)
    tokenizer: Tokenizer = default_checkpoint.tokenizer
    return Checkpoint("tiny", model.config, model, tokenizer)


@pytest.fixture(scope="session")
def tiny_layout(tiny_checkpoint: Checkpoint) -> BaseLayout:
    return checkpoint_layout(tiny_checkpoint, torch.float32)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterWriter:
    """Writes random adapters for one base model as PEFT would, without building the model."""

    def __init__(self, root: Path, layout: BaseLayout) -> None:
        self.root = root
        self._layout = layout

    def lora(
        self,
        name: str,
        rank: int,
        targets: Sequence[str] = LINEARS,
        layers: Iterable[int] | None = None,
        seed: int = 0,
        scale: float = 1.0,
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, (rows, columns) in self._modules(targets, layers):
            a = torch.randn(rank, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, rank, generator=generator) * scale / rank
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        return self._write(name, config | {"target_modules": list(targets)}, tensors)

    def shira(
        self,
        name: str,
        rank: int,
        targets: Sequence[str] = LINEARS,
        layers: Iterable[int] | None = None,
        seed: int = 0,
        scale: float = 1.0,
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, (rows, columns) in self._modules(targets, layers):
            count = min(rank * (rows + columns), rows * columns)
            flat = torch.randperm(rows * columns, generator=generator)[:count].sort().values
            indices = torch.stack((flat // columns, flat % columns)).int()
            values = torch.randn(count, generator=generator) * scale / (count / rows) ** 0.5
            tensors[f"base_model.model.{module}.shira_weight"] = values
            tensors[f"base_model.model.{module}.shira_indices"] = indices
        config = {"peft_type": "SHIRA", "r": rank, "mask_type": "random"}
        return self._write(name, config | {"target_modules": list(targets)}, tensors)

    def _modules(
        self, targets: Sequence[str], layers: Iterable[int] | None
    ) -> Iterator[tuple[str, tuple[int, int]]]:
        wanted = None if layers is None else set(layers)
        for module, shape in self._layout.module_shapes.items():
            layer, part = int(module.split(".")[2]), module.rpartition(".")[2]
            if part in targets and (wanted is None or layer in wanted):
                yield module, shape

    def _write(self, name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
        folder = self.root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder


@pytest.fixture
def adapter_writer(tmp_path: Path) -> Callable[[BaseLayout], AdapterWriter]:
    return lambda layout: AdapterWriter(tmp_path, layout)
