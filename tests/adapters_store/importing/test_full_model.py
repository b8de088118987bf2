from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.importing.full_model import num_weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_s_weights_are_counted_once(
    tied: bool,
    bias: bool,
    make_grouped_model: Callable[..., LlamaForCausalLM],
    grouped_layout: Callable[[LlamaForCausalLM], BaseLayout],
) -> None:
    model = make_grouped_model(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    assert num_weights(grouped_layout(model)) == model.num_parameters()
