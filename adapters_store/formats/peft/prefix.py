"""PEFT's prefix tuning (arXiv:2101.00190) and Cartridges (arXiv:2506.06266): keys and values that
lie in the cache before the sequence begins.

Prefix tuning may have trained an MLP that makes them; the file has what it made. Keys are cached
as they are: whatever rotation belongs to their positions is in the numbers already.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Prefix
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.peft.virtual_tokens import (
    EMBEDDINGS,
    HONOURED,
    VirtualTokenFormat,
    check_size,
    num_virtual_tokens,
)
from polydelta.adapters_store.formats.peft_config import Config, key_rules, positive_int


def _shapes(config: Config) -> dict[str, Shape]:
    layers, size, _ = (
        positive_int(field, config.get(field))
        for field in ("num_layers", "token_dim", "num_attention_heads")
    )
    return {EMBEDDINGS: (num_virtual_tokens(config), 2 * layers * size)}


def _read(config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout) -> Prefix:
    check_size("num_layers", config["num_layers"], layout.num_layers)
    # PEFT writes the number of heads that have keys under this name.
    check_size("num_attention_heads", config["num_attention_heads"], layout.num_kv_heads)
    check_size("token_dim", config["token_dim"], layout.num_kv_heads * layout.head_dim)
    # [n, layers, 2, kv_heads, head_dim]
    keys_values = tensors[EMBEDDINGS].view(
        -1, layout.num_layers, 2, layout.num_kv_heads, layout.head_dim
    )
    return Prefix(keys_values.permute(1, 2, 0, 3, 4).contiguous())


FORMAT = VirtualTokenFormat(
    rules=key_rules(
        honoured=HONOURED | {"num_attention_heads", "num_layers"},
        harmless={
            # How the prefix was started, and what made it in training.
            "encoder_hidden_size",
            "init_weights",
            "prefix_projection",
            # Of a Cartridge: tokens that training left as they were.
            "num_frozen_tokens",
        },
    ),
    kind=Prefix.kind,
    sizes="num_virtual_tokens, and 2 * num_layers * token_dim,",
    shapes=_shapes,
    read_tokens=_read,
)
