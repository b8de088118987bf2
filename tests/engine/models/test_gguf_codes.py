"""Codes that are kept as a GGUF file has them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.gguf_codes import quantized_weight
from polydelta.engine.models.gguf_file import GgufFile
from polydelta.engine.models.gguf_head import GgufTensor
from polydelta.engine.models.weights import Weights


def tensor(kind: Kind, shape: tuple[int, ...] = (5, 96)) -> GgufTensor:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return GgufTensor("w", shape, kind, gguf.quantize(values, kind))


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q8_0, 8), (Kind.Q4_0, 4), (Kind.Q4_1, 4)])
def test_codes_and_scales_give_what_the_library_dequantises(kind: Kind, bits: int) -> None:
    stored = tensor(kind)
    weight = quantized_weight(stored)
    assert weight is not None
    assert (weight.bits, weight.shape) == (bits, stored.shape)
    expected = gguf.dequantize(stored.data, kind)
    assert torch.equal(weight.dequantized(), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", [Kind.Q5_1, Kind.F16, Kind.F32])
def test_other_formats_are_not_kept(kind: Kind) -> None:
    assert quantized_weight(tensor(kind)) is None


def test_what_is_no_matrix_is_not_kept() -> None:
    assert quantized_weight(tensor(Kind.Q8_0, (64,))) is None


def test_the_default_model_keeps_all_of_its_codes(default_checkpoint: Checkpoint) -> None:
    file = default_checkpoint.tensors
    assert isinstance(file, GgufFile)
    # Rows of q and k are put into another order.
    for part, bits in (("self_attn.q_proj", 4), ("self_attn.k_proj", 4), ("mlp.down_proj", 4)):
        weight = file.read_quantized(f"model.layers.7.{part}.weight")
        assert weight is not None
        assert weight.bits == bits
        assert torch.equal(weight.dequantized(), file.read(f"model.layers.7.{part}.weight"))
    embedding = file.read_quantized("model.embed_tokens.weight")
    assert embedding is not None
    assert embedding.bits == 8


def test_a_file_with_more_bits_than_asked_for_is_rounded(default_checkpoint: Checkpoint) -> None:
    weights = Weights(default_checkpoint.tensors, torch.bfloat16, lambda *_: None)
    name, shape = "model.embed_tokens.weight", (49152, 576)
    assert weights.take_quantized(name, shape, 8).bits == 8
    assert weights.take_quantized(name, shape, 4).bits == 4
