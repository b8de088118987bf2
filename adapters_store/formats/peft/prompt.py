"""PEFT's prompt tuning (arXiv:2104.08691), P-tuning (arXiv:2103.10385) and context-aware prompt
tuning (CPT, arXiv:2410.17222): embeddings of virtual tokens before those of the sequence.

P-tuning trains an encoder that makes them, CPT a bounded change of real tokens' embeddings; the
files have the sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Delta, Prompt
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.virtual_tokens import (
    EMBEDDINGS,
    HONOURED,
    check_names,
    check_size,
    num_virtual_tokens,
)
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    Config,
    KeyRules,
    positive_int,
)
from polydelta.adapters_store.formats.peft_tensors import check_shape
from polydelta.adapters_store.reference import CONFIG_FILE

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


@dataclass(frozen=True)
class PromptFormat:
    """A parser of one of these formats: they differ in how they train, so in their keys alone."""

    training: frozenset[str]

    @property
    def rules(self) -> KeyRules:
        return KeyRules(HONOURED, COMMON_HARMLESS | OF_BASE | self.training, COMMON_REFUSED)

    def outline(self, config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        """The one prompt, from the config and the tensor's shape alone.

        Raises InvalidAdapterError for all that is wrong whatever the base.
        """
        self.rules.check(config)
        check_names(shapes, (EMBEDDINGS,))
        check_embeddings(config, shapes[EMBEDDINGS])
        return {MODEL: ModuleOutline(Prompt.kind, 0)}

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
    ) -> dict[str, tuple[Delta, ...]]:
        """The prompt, in float32. Raises InvalidAdapterError."""
        self.outline(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        check_size("token_dim", config["token_dim"], layout.hidden_size)
        return {MODEL: (Prompt(to_float32(EMBEDDINGS, tensors[EMBEDDINGS])),)}


def check_embeddings(config: Config, shape: Shape) -> None:
    """Raises InvalidAdapterError unless it is `[n, hidden]` as the config has them."""
    expected = num_virtual_tokens(config), positive_int("token_dim", config.get("token_dim"))
    why = f"num_virtual_tokens and token_dim in {CONFIG_FILE}"
    check_shape(EMBEDDINGS, shape, expected, why)


PROMPT_TUNING = PromptFormat(INITIALISATION)
P_TUNING = PromptFormat(
    frozenset(
        {
            "encoder_dropout",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_reparameterization_type",
        }
    )
)
CPT = PromptFormat(
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
