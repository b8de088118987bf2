"""The default model against transformers, which reads and dequantises the same GGUF file itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from polydelta.engine.models.checkpoint import Checkpoint, default_model
from polydelta.engine.request import GenerationRequest, SamplingParams

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Write the date 3rd of March 2024 in ISO form.",
    "1, 1, 2, 3, 5, 8,",
    "Die Hauptstadt von Deutschland",
    "Water boils at",
    "Dear Sir or Madam,\n\n",
    "Q: What is the largest planet?\nA:",
    '{"name": "widget", "price":',
    "The quick brown fox",
]


@pytest.fixture(scope="module")
def reference() -> AutoModelForCausalLM:
    path = default_model()
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [PROMPTS[:3], pytest.param(PROMPTS[3:], marks=pytest.mark.long)], ids=["3", "the rest"]
)
def test_greedy_tokens_equal_those_of_transformers_over_200_tokens(
    asked: list[str],
    reference: AutoModelForCausalLM,
    default_checkpoint: Checkpoint,
    serve: Callable,
    run: Callable,
) -> None:
    prompts = [default_checkpoint.tokenizer.encode(prompt) for prompt in asked]
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    requests = [
        GenerationRequest(str(number), prompt, params) for number, prompt in enumerate(prompts)
    ]
    with serve(default_checkpoint, pool_bytes=256 << 20) as engine:
        answers = run(engine, requests)
    for number, prompt in enumerate(prompts):
        with torch.inference_mode():
            expected = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=200,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        assert answers[str(number)].token_ids == expected, asked[number]


def test_the_tokenizer_from_the_file_equals_that_of_transformers(
    default_checkpoint: Checkpoint,
) -> None:
    path = default_model()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [*PROMPTS, "naïve café 12345 😀 don't\t\n\n  x", "<|im_start|>user\nhi<|im_end|>"]
    for text in texts:
        ids = default_checkpoint.tokenizer.encode(text)
        assert ids == reference(text).input_ids
        assert default_checkpoint.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_conversation_is_rendered_as_transformers_renders_it(
    default_checkpoint: Checkpoint,
) -> None:
    path = default_model()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    messages = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert default_checkpoint.tokenizer.chat(messages) == reference(text).input_ids
