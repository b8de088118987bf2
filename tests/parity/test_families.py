"""Every served family against transformers, float32, through the paged cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama with tied embeddings": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama with its own head size": LlamaConfig(**SIZES, head_dim=12),
    "llama with llama3 rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama with linear rope": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama with yarn rope": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama with yarn rope and mscale": LlamaConfig(
        **SIZES, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16}
    ),
    "llama without grouped heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 6}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral with a sliding window": MistralConfig(**SIZES, sliding_window=13),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 with a sliding window on its last layers": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=11, max_window_layers=1
    ),
    "qwen2 with tied embeddings": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3 with tied embeddings and yarn": Qwen3Config(
        **SIZES, head_dim=8, tie_word_embeddings=True, rope_parameters=YARN
    ),
}


@pytest.fixture(params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[request.param], attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh norms are ones and fresh biases zeros: neither would show a mistake.
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.25 * noise)
    return model


def expected(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def some_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 101, (count,), generator=generator).tolist()


def test_prefill_gives_the_logits_of_transformers(model: PreTrainedModel, paged: Callable) -> None:
    tokens = some_tokens(53, seed=1)
    (logits,) = paged(model).feed((0, tokens))
    torch.testing.assert_close(logits, expected(model, tokens), atol=1e-4, rtol=0)


def test_chunked_prefill_gives_the_logits_of_transformers(
    model: PreTrainedModel, paged: Callable
) -> None:
    tokens, decoder = some_tokens(61, seed=2), paged(model)
    cuts = [0, 5, 24, 25, 40, 61]
    chunks = [decoder.feed((0, tokens[a:b]))[0] for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(chunks), expected(model, tokens), atol=1e-4, rtol=0)


def test_decode_gives_the_logits_of_transformers(model: PreTrainedModel, paged: Callable) -> None:
    tokens, decoder = some_tokens(45, seed=3), paged(model)
    steps = [decoder.feed((0, tokens[:17]))[0]]
    steps += [decoder.feed((0, [token]))[0] for token in tokens[17:]]
    torch.testing.assert_close(torch.cat(steps), expected(model, tokens), atol=1e-4, rtol=0)


def test_a_mixed_step_gives_each_sequence_its_own_logits(
    model: PreTrainedModel, paged: Callable
) -> None:
    """Decoding and prefilling sequences of very different lengths share steps."""
    decoder = paged(model)
    long, short, late = (some_tokens(n, seed=n) for n in (131, 9, 30))
    decoder.feed((0, long[:-2]))
    decoder.feed((1, short[:-2]), (0, long[-2:-1]))
    got = decoder.feed((1, short[-2:-1]), (2, late[:22]), (0, long[-1:]))
    got += decoder.feed((2, late[22:]), (1, short[-1:]))
    for logits, tokens, rows in zip(
        got,
        (short, late, long, late, short),
        (slice(7, 8), slice(0, 22), slice(130, 131), slice(22, 30), slice(8, 9)),
        strict=True,
    ):
        torch.testing.assert_close(logits, expected(model, tokens)[rows], atol=1e-4, rtol=0)
