"""Predictions of the engine side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.reference import CONFIG_FILE, AdapterRef
from polydelta.engine.drift import drift, log_probabilities
from polydelta.engine.models.checkpoint import Checkpoint

TOKENS = [1, 4000, 7, 7, 30, 49151, 0]


def test_log_probabilities_are_those_of_transformers_and_peft_at_every_place(
    tiny_checkpoint: Checkpoint,
    tiny_model: LlamaForCausalLM,
    tiny_layout: BaseLayout,
    adapter_writer: Callable,
    serve: Callable,
) -> None:
    folder = adapter_writer(tiny_layout).lora("lora", rank=5)
    with serve(tiny_checkpoint, pool_bytes=128 << 20) as engine:
        base = log_probabilities(engine, TOKENS, None)
        adapted = log_probabilities(engine, TOKENS, AdapterRef("lora", 1, folder))
    with torch.no_grad():
        want = tiny_model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
        torch.testing.assert_close(base, want, atol=1e-4, rtol=1e-4)
        peft = PeftModel.from_pretrained(tiny_model, folder).eval()
        want = peft(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
        peft.unload()
    torch.testing.assert_close(adapted, want, atol=1e-4, rtol=1e-4)
    assert drift(adapted, base).mean > 0.01


def test_an_adapter_that_is_not_served_is_one_clear_error(
    tiny_checkpoint: Checkpoint, tiny_layout: BaseLayout, adapter_writer: Callable, serve: Callable
) -> None:
    folder: Path = adapter_writer(tiny_layout).lora("lora", rank=2)
    (folder / CONFIG_FILE).write_text('{"peft_type": "NEWEST"}')
    with (
        serve(tiny_checkpoint) as engine,
        pytest.raises(InvalidAdapterError, match="peft_type is 'NEWEST'"),
    ):
        log_probabilities(engine, TOKENS, AdapterRef("lora", 1, folder))


def test_drift_is_measured_as_torch_does() -> None:
    first, second = (torch.randn(5, 33).log_softmax(-1) for _ in range(2))
    found = drift(first, second)
    divergence = F.kl_div(second, first, reduction="none", log_target=True).sum(-1)
    assert found.largest_divergence == pytest.approx(float(divergence.max()), rel=1e-4)
    assert found.mean_divergence == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert found.largest == float((first - second).abs().max())
    assert found.mean == float((first - second).abs().mean())


def test_equal_predictions_have_no_drift() -> None:
    same = torch.randn(5, 33).log_softmax(-1)
    found = drift(same, same.clone())
    numbers = (found.largest, found.mean, found.largest_divergence, found.mean_divergence)
    assert numbers == (0.0, 0.0, 0.0, 0.0)
