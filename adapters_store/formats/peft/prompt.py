"""PEFT's prompt tuning (arXiv:2104.08691), P-tuning (arXiv:2103.10385) and context-aware prompt
tuning (CPT, arXiv:2410.17222): embeddings of virtual tokens before those of the sequence.

P-tuning trains an encoder that makes them, CPT a bounded change of real tokens' embeddings; the
files have the sums.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Prompt
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.peft.virtual_tokens import (
    EMBEDDINGS,
    HONOURED,
    VirtualTokenFormat,
    check_size,
    num_virtual_tokens,
)
from polydelta.adapters_store.formats.peft_config import Config, key_rules, positive_int

# Of the base that it was trained on, and without a part in the forward pass.
OF_BASE = frozenset({"num_attention_heads", "num_layers"})
# What the embeddings were started from.
INITIALISATION = frozenset(
    {
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)


def embedding_shapes(config: Config) -> dict[str, Shape]:
    """Raises InvalidAdapterError."""
    size = positive_int("token_dim", config.get("token_dim"))
    return {EMBEDDINGS: (num_virtual_tokens(config), size)}


def read_embeddings(config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout) -> Prompt:
    """Raises InvalidAdapterError for those of another base."""
    check_size("token_dim", config["token_dim"], layout.hidden_size)
    return Prompt(tensors[EMBEDDINGS])


def _format(training: frozenset[str]) -> VirtualTokenFormat:
    """These formats differ in how they train, so in their keys alone."""
    return VirtualTokenFormat(
        rules=key_rules(HONOURED, OF_BASE | training),
        kind=Prompt.kind,
        sizes="num_virtual_tokens and token_dim",
        shapes=embedding_shapes,
        read_tokens=read_embeddings,
    )


PROMPT_TUNING = _format(INITIALISATION)
P_TUNING = _format(
    frozenset(
        {
            "encoder_dropout",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_reparameterization_type",
        }
    )
)
CPT = _format(
    frozenset(
        {
            # The tokens that it started from, and which of them could change how much.
            "cpt_mask",
            "cpt_token_ids",
            "cpt_tokens_type_mask",
            "opt_projection_epsilon",
            "opt_projection_format_epsilon",
            "tokenizer_name_or_path",
            # The loss.
            "opt_loss_decay_factor",
            "opt_weighted_loss_type",
        }
    )
)
