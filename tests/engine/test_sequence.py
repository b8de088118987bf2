"""What a sequence learns of its adapters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.sequence import NEVER, Sequence

ORDINARY = AdapterTraits()


def sequence_of(*tokens: int) -> Sequence:
    return Sequence(GenerationRequest("r", tokens, SamplingParams()), lambda output: None)


@pytest.mark.parametrize(
    ("prompt", "invocation", "activation"),
    [
        ([5, 6, 7], (), 0),
        ([5, 6, 7], (5,), 0),
        ([5, 6, 7, 5, 6], (5, 6), 3),
        ([5, 6, 7, 5], (5, 6), 0),
        ([5, 5, 5], (5, 5), 1),
        ([5, 6], (5, 6, 7), NEVER),
        ([5, 6], (6, 5), NEVER),
    ],
)
def test_an_activated_adapter_acts_from_the_last_occurrence_on(
    prompt: list[int], invocation: tuple[int, ...], activation: int
) -> None:
    sequence = sequence_of(*prompt)
    sequence.learn([AdapterTraits(invocation=invocation)])
    assert sequence.activation == activation


@given(
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20),
    invocation=st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
def test_the_activation_is_where_peft_activates_when_it_generates(
    prompt: list[int], invocation: list[int]
) -> None:
    sequence = sequence_of(*prompt)
    sequence.learn([AdapterTraits(invocation=tuple(invocation))])
    config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    (from_the_end,) = calculate_alora_offsets({"x": config}, "x", torch.tensor([prompt]))
    expected = NEVER if from_the_end is None else len(prompt) - from_the_end
    assert sequence.activation == expected


def test_what_was_learned_holds_though_the_answer_says_the_invocation() -> None:
    sequence = sequence_of(5, 1)
    sequence.token_ids.append(5)
    for _ in range(2):
        sequence.learn([AdapterTraits(num_prefix_tokens=3, invocation=(5,))])
        sequence.token_ids.append(5)
    assert (sequence.activation, sequence.num_prefix_tokens) == (0, 3)


def test_the_base_and_sums_of_ordinary_adapters_have_nothing_to_learn() -> None:
    for traits in ([], [ORDINARY], [ORDINARY] * 3):
        sequence = sequence_of(5, 6)
        sequence.learn(traits)
        assert (sequence.activation, sequence.num_prefix_tokens) == (0, 0)
