"""PEFT's prefix tuning (arXiv:2101.00190) and Cartridges (arXiv:2506.06266): keys and values that
lie in the cache before the sequence begins.

Prefix tuning may have trained an MLP that makes them; the file has what it made. Keys are cached
as they are: whatever rotation belongs to their positions is in the numbers already.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Delta, Prefix
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

KEY_RULES = KeyRules(
    honoured=HONOURED | {"num_attention_heads", "num_layers"},
    harmless=COMMON_HARMLESS
    | {
        # How the prefix was started, and what made it in training.
        "encoder_hidden_size",
        "init_weights",
        "prefix_projection",
        # Of a Cartridge: tokens that training left as they were.
        "num_frozen_tokens",
    },
    refused=COMMON_REFUSED,
)


def outline(config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """The one prefix, from the config and the tensor's shape alone.

    Raises InvalidAdapterError for all that is wrong whatever the base.
    """
    KEY_RULES.check(config)
    check_names(shapes, (EMBEDDINGS,))
    size = 2 * _positive(config, "num_layers") * _positive(config, "token_dim")
    _positive(config, "num_attention_heads")
    check_shape(
        EMBEDDINGS,
        shapes[EMBEDDINGS],
        (num_virtual_tokens(config), size),
        f"num_virtual_tokens, and 2 * num_layers * token_dim, in {CONFIG_FILE}",
    )
    return {MODEL: ModuleOutline(Prefix.kind, 0)}


def read(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    """The prefix, in float32. Raises InvalidAdapterError."""
    outline(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    check_size("num_layers", config["num_layers"], layout.num_layers)
    # PEFT writes the number of heads that have keys under this name.
    check_size("num_attention_heads", config["num_attention_heads"], layout.num_kv_heads)
    check_size("token_dim", config["token_dim"], layout.num_kv_heads * layout.head_dim)
    # [n, layers, 2, kv_heads, head_dim]
    keys_values = to_float32(EMBEDDINGS, tensors[EMBEDDINGS]).view(
        -1, layout.num_layers, 2, layout.num_kv_heads, layout.head_dim
    )
    return {MODEL: (Prefix(keys_values.permute(1, 2, 0, 3, 4).contiguous()),)}


def _positive(config: Config, field: str) -> int:
    return positive_int(field, config.get(field))
