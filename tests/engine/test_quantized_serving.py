"""Engines whose base has weights of 4 or 8 bits, with and without adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.build import assemble
from polydelta.engine.config import EngineConfig
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import HEAD_BITS, base_layout
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.weights import TensorSource
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.kernels.ops import QuantizedKernels, kernels_for
from polydelta.kernels.quantized_weight import quantize

CPU = torch.device("cpu")
needs_our_kernels = pytest.mark.skipif(
    not isinstance(kernels_for(CPU, torch.bfloat16), QuantizedKernels),
    reason="needs a C compiler and AVX512-BF16",
)


class RoundedTensors:
    """A checkpoint's tensors with matrices rounded to so many bits; the head is one of its own."""

    def __init__(self, source: TensorSource, bits: int) -> None:
        self._source, self._bits = source, bits

    def names(self) -> Collection[str]:
        return {*self._source.names(), "lm_head.weight"}

    def read(self, name: str) -> Tensor:
        if name == "lm_head.weight":
            return quantize(self._source.read("model.embed_tokens.weight"), HEAD_BITS).dequantized()
        tensor = self._source.read(name)
        if tensor.dim() == 2 and "embed" not in name:
            return quantize(tensor, self._bits).dequantized()
        return tensor


def rounded(checkpoint: Checkpoint, bits: int) -> Checkpoint:
    """As a model of plain weights."""
    config = replace(checkpoint.config, tie_embeddings=False)
    return replace(checkpoint, config=config, tensors=RoundedTensors(checkpoint.tensors, bits))


def write(writer: Callable, checkpoint: Checkpoint) -> FolderCatalog:
    files = writer(base_layout(checkpoint.config, checkpoint.id))
    files.lora("lora", 5, seed=1, scale=0.5)
    files.shira("shira", 2, seed=2, scale=0.3)
    return FolderCatalog([files.root])


def requests(catalog: FolderCatalog, tokens: int = 20) -> list[GenerationRequest]:
    """Of the base and of each adapter, with prompts of different lengths."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return [
        GenerationRequest(
            f"{number}",
            [3 + (37 * number + 11 * place) % 4000 for place in range(7 + 5 * number)],
            params,
            (Share(catalog.resolve(name)),) if name else (),
        )
        for number, name in enumerate((None, "lora", "shira", "lora", None, "shira"))
    ]


@needs_our_kernels
@pytest.mark.parametrize(("quantization", "bits"), [("int4", 4), ("int8", 8)])
def test_a_quantised_model_answers_as_one_with_the_rounded_weights_does(
    tiny_checkpoint: Checkpoint,
    adapter_writer: Callable,
    serve: Callable,
    run: Callable,
    quantization: str,
    bits: int,
) -> None:
    catalog = write(adapter_writer, tiny_checkpoint)
    each = requests(catalog)
    with serve(rounded(tiny_checkpoint, bits), dtype="bfloat16") as engine:
        want = {key: answer.token_ids for key, answer in run(engine, each).items()}
    with serve(tiny_checkpoint, dtype="bfloat16", quantization=quantization) as engine:
        together = {key: answer.token_ids for key, answer in run(engine, each).items()}
        alone = {r.request_id: run(engine, [r])[r.request_id].token_ids for r in each}
    assert together == alone == want
    assert want["0"] != want["4"]


@needs_our_kernels
def test_the_default_model_answers_from_its_own_codes_as_it_does_in_bfloat16(
    default_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    catalog = write(adapter_writer, default_checkpoint)
    each = requests(catalog, tokens=6)
    answers = []
    for quantization in (None, "int4"):
        options = {"dtype": "bfloat16", "quantization": quantization, "pool_bytes": 256 << 20}
        with serve(default_checkpoint, **options) as engine:
            answers.append({key: a.token_ids for key, a in run(engine, each).items()})
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, "'int3' is not supported: use int8 or int4"),
        ({"quantization": "int8", "dtype": "float32"}, "needs dtype bfloat16"),
        ({"quantization": "int4", "fuse_after": 3}, "fuse_after 3 exclude each other"),
    ],
)
def test_what_cannot_be_quantised_is_said_at_the_start(
    tiny_checkpoint: Checkpoint, options: dict, message: str
) -> None:
    config = EngineConfig(**options)
    kernels = kernels_for(CPU, getattr(torch, config.dtype))
    with pytest.raises(ModelError, match=message):
        assemble(tiny_checkpoint, config, kernels)


def test_quantised_weights_are_refused_on_a_gpu(tiny_checkpoint: Checkpoint) -> None:
    config = EngineConfig(quantization="int4", pool_bytes=1 << 20)
    kernels = kernels_for(torch.device("cuda", 0), torch.bfloat16)
    with pytest.raises(ModelError, match="'int4' is served on CPUs only: leave it out"):
        assemble(tiny_checkpoint, config, kernels)


def test_weights_that_cannot_be_rounded_are_named(tiny_checkpoint: Checkpoint) -> None:
    class Broken(RoundedTensors):
        def read(self, name: str) -> Tensor:
            tensor = self._source.read(name)
            return tensor / 0 if name == "model.layers.1.mlp.up_proj.weight" else tensor

        def names(self) -> Collection[str]:
            return self._source.names()

    kernels = kernels_for(CPU, torch.bfloat16)
    if not isinstance(kernels, QuantizedKernels):
        pytest.skip("needs a C compiler and AVX512-BF16")
    broken = replace(tiny_checkpoint, tensors=Broken(tiny_checkpoint.tensors, 8))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight' cannot be quantised"):
        assemble(broken, EngineConfig(quantization="int8"), kernels)
