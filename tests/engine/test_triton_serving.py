"""A whole engine on the GPU's kernels; where there is no GPU, Triton's interpreter runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.composition import Share, combine
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.build import assemble
from polydelta.engine.config import EngineConfig
from polydelta.engine.engine import Engine
from polydelta.engine.models.base_weights import checkpoint_layout
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.hf_folder import HfFolder
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.kernels.ops import Kernels, RecordedStep, kernels_for
from polydelta.kernels.triton.graphs import take_inputs
from polydelta.kernels.triton.kernels import TritonKernels

pytestmark = pytest.mark.slow

CUDA = torch.cuda.is_available()
NAMES = (None, "lora-3", "lora-17", "shira", "lora-3", "sum")


class RepeatedStep:
    """What a CUDA graph does: the very step again, on what is where its inputs were."""

    def __init__(self, inputs: Sequence[Any], run: Callable[[], Tensor]) -> None:
        self._inputs, self._run = inputs, run

    def replay(self, inputs: Sequence[Any]) -> Tensor:
        take_inputs(self._inputs, inputs)
        return self._run()


class RecordingKernels(TritonKernels):
    """In the interpreter, with recorded steps all the same."""

    num_recorded = 0

    def sizes_to_record(self, most_rows: int) -> Sequence[int]:
        return super().sizes_to_record(most_rows) if CUDA else (2, 1)

    def record(
        self, inputs: Sequence[Any], run: Callable[[], Tensor]
    ) -> tuple[Tensor, RecordedStep | None]:
        if CUDA:
            return super().record(inputs, run)
        self.num_recorded += 1
        return run(), RepeatedStep(inputs, run)


@pytest.fixture(scope="module")
def small_checkpoint(
    default_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """Of a vocabulary that an interpreter can look through."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    folder = tmp_path_factory.mktemp("small-model")
    model.save_pretrained(folder)
    files = HfFolder(folder)
    return Checkpoint("small", files.config, files, default_checkpoint.tokenizer)


@pytest.fixture
def adapters(adapter_writer: Callable[..., Any], small_checkpoint: Checkpoint) -> Path:
    write = adapter_writer(checkpoint_layout(small_checkpoint, torch.float32))
    write.lora("lora-3", 3, seed=1)
    write.lora("lora-17", 17, targets=("q_proj", "o_proj", "up_proj"), seed=2)
    write.shira("shira", 2, seed=3, scale=0.3)
    return write.root


@contextmanager
def serving(checkpoint: Checkpoint, kernels: Kernels, **options: Any) -> Iterator[Engine]:
    options = {"dtype": "float32", "check_integrity": True, "pool_bytes": 4 << 20} | options
    engine = assemble(checkpoint, EngineConfig(**options), kernels)
    engine.start()
    try:
        yield engine
    finally:
        assert engine.alive, "the engine's loop died during the test"
        engine.shutdown()


def requests(root: Path, **params: Any) -> list[GenerationRequest]:
    catalog = FolderCatalog([root])
    made = []
    for number, name in enumerate(NAMES):
        weights = {"lora-3": 0.6, "shira": -0.5} if name == "sum" else {name: 1.0} if name else {}
        made.append(
            GenerationRequest(
                f"{number} {name}",
                [3 + (7 * number * place) % 200 for place in range(1, 2 + 3 * number)],
                SamplingParams(
                    **{"max_tokens": 4, "ignore_eos": True, "temperature": 0.0} | params
                ),
                combine(Share(catalog.resolve(one), weight) for one, weight in weights.items()),
            )
        )
    return made


@pytest.fixture
def kernels() -> RecordingKernels:
    return RecordingKernels(torch.device("cuda" if CUDA else "cpu"))


def tokens(engine: Engine, run: Callable[..., Any], asked: Sequence[Any]) -> dict[str, list[int]]:
    return {name: answer.token_ids for name, answer in run(engine, asked).items()}


@pytest.mark.parametrize(
    ("steps_ahead", "params"),
    [
        pytest.param(1, {}, id="greedy, overlapped"),
        pytest.param(
            0,
            {"temperature": 0.8, "top_p": 0.8, "top_k": 40, "seed": 3},
            id="seeded",
            marks=pytest.mark.long,
        ),
    ],
)
def test_answers_equal_the_cpus_in_one_batch_of_many_adapters(
    steps_ahead: int,
    params: dict[str, Any],
    kernels: RecordingKernels,
    small_checkpoint: Checkpoint,
    adapters: Path,
    run: Callable[..., Any],
) -> None:
    asked = requests(adapters, **params)
    cpu = kernels_for(torch.device("cpu"), torch.float32)
    with serving(small_checkpoint, cpu) as engine:
        expected = tokens(engine, run, asked)
    # Few tokens a step, so that prompts come in pieces beside decodes.
    with serving(small_checkpoint, kernels, max_batch_tokens=40, steps_ahead=steps_ahead) as engine:
        assert tokens(engine, run, asked) == expected
    assert CUDA or kernels.num_recorded > 4, "decode steps of more than two rows were recorded"


def test_adapters_in_scattered_pages_and_evicted_ones_answer_alike(
    kernels: RecordingKernels,
    small_checkpoint: Checkpoint,
    adapters: Path,
    run: Callable[..., Any],
) -> None:
    asked = requests(adapters)
    cpu = kernels_for(torch.device("cpu"), torch.float32)
    with serving(small_checkpoint, cpu) as engine:
        expected = tokens(engine, run, asked)
    with serving(
        small_checkpoint, kernels, pool_bytes=24 * 2 * 2048, block_size=16, max_batch_size=3
    ) as engine:
        assert tokens(engine, run, asked) == expected
        stats = engine.stats()
    assert stats.adapter_evictions + stats.preemptions > 0, "the pool was not small enough"


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        pytest.param({"kv_select": "window:2+9"}, 4, id="a window"),
        pytest.param({"kv_format": "fp8", "kv_select": "quest:32"}, 0, id="fp8 and quest"),
    ],
)
def test_answers_over_other_kv_equal_the_cpus(
    options: dict[str, Any],
    recorded: int,
    kernels: RecordingKernels,
    small_checkpoint: Checkpoint,
    adapters: Path,
    run: Callable[..., Any],
) -> None:
    """Steps that read as the server does are recorded ahead, where they can be."""
    asked = requests(adapters)[:4]
    cpu = kernels_for(torch.device("cpu"), torch.float32)
    with serving(small_checkpoint, cpu, block_size=4, **options) as engine:
        expected = tokens(engine, run, asked)
    with serving(small_checkpoint, kernels, block_size=4, **options) as engine:
        ahead = kernels.num_recorded
        assert tokens(engine, run, asked) == expected
    assert CUDA or ahead == recorded
