"""What all sections of the GPU benchmark share: sizes, kernels, the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_clock import Ceilings, Clock, measure_ceilings
from polydelta.engine.kv_spec import kv_page_bytes
from polydelta.engine.models.config import ModelConfig, RopeConfig
from polydelta.kernels.ops import Kernels
from polydelta.kernels.triton.kernels import TritonKernels

DTYPE, BLOCK_SIZE = torch.bfloat16, 16


@dataclass(frozen=True)
class Sizes:
    """Of all work."""

    model: ModelConfig
    # Rows of a decode step, and ranks of adapters, of the kernels alone.
    batches: Sequence[int]
    ranks: Sequence[int]
    # Sequences whose attention is timed, and the tokens that each has.
    attention_batches: Sequence[int]
    context: int
    # Other sizes of a head, beside the model's.
    head_sizes: Sequence[int]
    # Tokens of a prefill.
    prompt: int
    # Of what is measured of the engine: sequences, and distinct adapters.
    engine_batches: Sequence[int]
    engine_adapters: Sequence[int]
    # Tokens that each sequence of the engine has before, and gets.
    engine_prompt: int
    engine_tokens: int
    # Tokens that a step sees, and its sequences, for each way to store and read KV.
    kv_contexts: Sequence[int]
    kv_batches: Sequence[int]
    # Of requests that are served in each of these ways, prompt and answer.
    kv_prompt: int
    kv_tokens: int
    # Ranks of adapters on their way from the host.
    swap_ranks: Sequence[int]
    # Entries of a vocabulary and rows that are sampled from.
    sampling: tuple[int, int]
    # Whose greedy answers are compared, in float32, and the length of these.
    parity_model: ModelConfig
    parity_tokens: int
    # Bytes that are copied, and the side of matrices that are multiplied, for the ceilings.
    copied: int
    multiplied: int

    @property
    def page_bytes(self) -> int:
        return kv_page_bytes(self.model, BLOCK_SIZE, DTYPE)


def model_of(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int
) -> ModelConfig:
    """A Llama of these sizes."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        rms_norm_eps=1e-5,
        context_length=context,
        rope=RopeConfig(500000.0),
        tie_embeddings=False,
        sliding_windows=(None,) * layers,
    )


FULL = Sizes(
    # Llama 3 8B.
    model=model_of(4096, 14336, 32, 32, 8, 128256, 8192),
    batches=(1, 4, 16, 64, 256),
    ranks=(8, 16, 64),
    attention_batches=(1, 16, 64),
    context=8192,
    head_sizes=(64, 80),
    prompt=2048,
    engine_batches=(1, 16, 64),
    engine_adapters=(1, 16, 64),
    engine_prompt=128,
    engine_tokens=48,
    kv_contexts=(1024, 4096, 8192),
    kv_batches=(1, 8),
    kv_prompt=1024,
    kv_tokens=64,
    swap_ranks=(16, 64),
    sampling=(64, 128256),
    parity_model=model_of(240, 632, 3, 6, 2, 1009, 512),
    parity_tokens=12,
    copied=1 << 30,
    multiplied=8192,
)
# For runs without a GPU: they show that everything runs, and no time.
QUICK = Sizes(
    model=model_of(64, 96, 1, 4, 2, 97, 128),
    batches=(2,),
    ranks=(2,),
    attention_batches=(2,),
    context=37,
    head_sizes=(),
    prompt=13,
    engine_batches=(2,),
    engine_adapters=(2,),
    engine_prompt=5,
    engine_tokens=3,
    kv_contexts=(75,),
    kv_batches=(2,),
    kv_prompt=21,
    kv_tokens=3,
    swap_ranks=(2,),
    sampling=(3, 97),
    parity_model=model_of(48, 72, 2, 4, 2, 211, 128),
    parity_tokens=4,
    copied=1 << 16,
    multiplied=32,
)


@dataclass(frozen=True, eq=False)
class Setup:
    """Handed to every section."""

    device: torch.device
    kernels: Kernels
    clock: Clock
    ceilings: Ceilings
    sizes: Sizes

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def randn(self, *shape: int) -> Tensor:
        """In the dtype of all that is measured."""
        return torch.randn(shape, device=self.device, dtype=DTYPE)

    def settle(self) -> None:
        """Frees what the last section has left, and waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def make_setup(device: torch.device, sizes: Sizes) -> Setup:
    clock = Clock(device)
    ceilings = measure_ceilings(clock, device, sizes.copied, sizes.multiplied)
    return Setup(device, TritonKernels(device), clock, ceilings, sizes)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The largest difference, beside the largest number."""
    difference = (value.float() - truth.float()).abs().max()
    return float(difference / truth.float().abs().max())
